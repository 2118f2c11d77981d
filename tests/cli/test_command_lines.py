"""Command lines and configurations drawn from the parsers and fields themselves, so that a new flag is covered.

Each is refused in a line, with exit code 2 and nothing written, or gets as far as the model. Nothing is loaded or trained.
"""

import argparse
import dataclasses
import json
import os
import re

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from peft import get_peft_model
from tiny import build

from lor2c.cli.main import COMMANDS, main, make_parser
from lor2c.experiments.contenders import _SETTINGS, contender_run
from lor2c.runs.build import adapter_config
from lor2c.runs.methods import METHODS
from lor2c.runs.trainer import callbacks_of
from lor2c.tuners.config import LoR2CConfig, ResLoRAConfig

ODD_TEXT = [
    "",
    " ",
    "x",
    "-1",
    "nan",
    "1e308",
    "0",
    "a" * 300,
    "a/b",
    "..",
    "\u00e9",
    "lora:rank=0",
    "lora:",
    ",",
    "0-",
    "null",
]
ODD_WHOLE = [*range(-2, 5), 7, 8, 9, 16, 64, 512, 2**16, 2**16 + 1, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63)]
ODD_WHOLE += [10**30, -(10**30)]
ODD_NUMBER = [0.0, -0.0, -1.0, 0.1, 0.5, 1.0, 1.5, 16.0, 1e-300, 5e-324, 1e-4, 1e30, 1e38, 1e308, -1e308]
ODD_NUMBER += [float("inf"), float("nan")]
ODD = [None, True, False, *ODD_WHOLE, *ODD_NUMBER, *ODD_TEXT, b"", [], [[]], [None], ["query"], ["query", 3]]
ODD += [[[0, 0]], [[1, 3]], [[3, 1]], [[0, 10**30]], [[0, 0.5]], [["0", "1"]], {}, {"0": [1, 2]}, {"x": 1}, {0: 1}]
ODD += [{0: [1, 2], 1: [2**20, 1]}, {10**30: [1, 1]}, {-1: [1, 1]}]


SETTINGS = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Reached(Exception):
    """All checks of the command line have been passed."""


def the_grammar() -> dict[str, list[argparse.Action]]:
    """Command -> its arguments."""
    choices = next(a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {name: [a for a in choices[name]._actions if a.dest not in ("help", "save_config")] for name in COMMANDS}


GRAMMAR = the_grammar()


def as_written(action: argparse.Action, value: str) -> list[str]:
    return [f"{action.option_strings[0]}={value}"] if action.option_strings else [value]


def values(action: argparse.Action) -> st.SearchStrategy[list[str]]:
    """What may be written for an argument: what its help names, and what nobody should write."""
    if action.nargs == 0:
        return st.just(list(action.option_strings[:1]))
    words = [*re.findall(r"[\w./:,-]*\w", action.help or ""), str(action.default)]
    kinds = {int: map(str, ODD_WHOLE), float: map(str, [*ODD_NUMBER, *ODD_WHOLE])}
    listed = st.lists(st.sampled_from(words), min_size=1, max_size=3).map(",".join)
    drawn = st.sampled_from([*kinds.get(action.type, words), *ODD_TEXT]) | listed
    return drawn.map(lambda value: as_written(action, value))


@st.composite
def command_lines(draw, given: dict[str, dict[str, str]]) -> list[str]:
    """A command that would run, with up to four of its arguments drawn."""
    command = draw(st.sampled_from(list(given)))
    actions = {action.dest: action for action in GRAMMAR[command]}
    drawn = draw(st.lists(st.sampled_from(list(actions)), max_size=4, unique=True))
    written = {dest: as_written(actions[dest], value) for dest, value in given[command].items()}
    written |= {dest: draw(values(actions[dest])) for dest in drawn}
    return [command, *(word for words in written.values() for word in words)]


@pytest.fixture(scope="module")
def given_arguments(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Command -> arguments with which it would run."""
    place = tmp_path_factory.mktemp("given")
    rows = [{"instruction": f"say {n}", "output": str(n)} for n in range(600)]
    (place / "rows.json").write_text(json.dumps(rows))
    (place / "model").mkdir()
    (place / "model/config.json").write_text("{}")
    run = {"model": "minilm", "output_dir": "run"}
    return {
        "demo": {"output_dir": "run"},
        "glue": {"task": "rte", **run},
        "alpaca": {**run, "model": "gemma-270m", "data_dir": str(place / "rows.json")},
        "compare": {"tasks": "rte", "methods": "lora,lor2c", **run},
        "sweep": {"task": "rte", **run},
        "paper": {"experiment": "lor2c-table1", "tasks": "rte", "size": "cpu", **run},
        "generate": {"adapter_dir": str(place / "model"), "prompt": "?"},
        "export": {"adapter_dir": str(place / "model"), "to": "new"},
        "inspect": {"adapter_dir": str(place / "model")},
    }


def look(run) -> None:
    """Stand in for building a model: an adapter as asked, on a small one, and the callbacks' word on it."""
    decoder = run.task == "alpaca"
    base, config = build("Llama" if decoder else "BERT"), adapter_config(run, [] if decoder else ["classifier"])
    assert (config is None) == (run.method == "full")
    model = base if config is None else get_peft_model(base, config)
    for callback in callbacks_of(run):
        if hasattr(callback, "check"):
            callback.check(model)
    raise Reached


def reach(*args, **kwargs) -> None:
    raise Reached


def ends_well(capsys, command: list[str]) -> str:
    """How a command ends; fails unless it is refused in a line, or has passed all checks. Nothing may have been written."""
    capsys.readouterr()
    try:
        main(command)
        ending = "done"
    except Reached:
        ending = "reached"
    except SystemExit as end:
        said = re.sub("^lor2c: note: .*\n", "", capsys.readouterr().err, flags=re.M)
        assert end.code == 2, said
        line = said[said.index("lor2c") :] if not said.startswith("usage:") else said[said.rindex("\nlor2c ") + 1 :]
        assert line.count("\n") == 1 and "error: " in line, said
        ending = "refused"
    assert os.listdir() == []
    return ending


@pytest.fixture
def nothing_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lor2c.runs.job._checked_model", look)
    monkeypatch.setattr("lor2c.inference.generate.load_decoder", reach)
    monkeypatch.setattr("lor2c.experiments.sweep._depth_of", lambda *_: 6)


def check_lines(capsys, given_arguments, examples: int) -> None:
    endings = set()

    @settings(SETTINGS, max_examples=examples)
    @given(command_lines(given_arguments))
    def check(command):
        endings.add(ends_well(capsys, command))

    check()
    assert {"reached", "refused"} <= endings


def test_any_command_line_is_taken_or_refused_in_a_line(capsys, given_arguments, nothing_loaded):
    check_lines(capsys, given_arguments, 120)


def test_many_command_lines(capsys, given_arguments, nothing_loaded):
    check_lines(capsys, given_arguments, 1500)


def check_configurations(examples: int) -> None:
    def drawn(cls) -> st.SearchStrategy:
        names = [field.name for field in dataclasses.fields(cls) if field.name not in ("peft_type", "auto_mapping")]
        usual = {field.name: field.default for field in dataclasses.fields(cls)}
        value = {name: st.sampled_from([*ODD, usual[name]]) for name in names}
        few = st.lists(st.sampled_from(names), max_size=3, unique=True)
        return few.flatmap(lambda few: st.fixed_dictionaries({name: value[name] for name in few}))

    @settings(SETTINGS, max_examples=examples)
    @given(st.sampled_from([LoR2CConfig, ResLoRAConfig]).flatmap(lambda cls: st.tuples(st.just(cls), drawn(cls))))
    def check(drawn):
        cls, changes = drawn
        try:
            targets = {"target_modules": ["query"]} if cls is ResLoRAConfig else {}
            get_peft_model(build("BERT"), cls(**targets | changes))
        except (ValueError, TypeError) as error:
            assert str(error)

    check()


def test_any_configuration_is_taken_or_refused():
    check_configurations(80)


def test_many_configurations():
    check_configurations(1000)


@settings(SETTINGS, max_examples=200)
@given(
    st.sampled_from(METHODS), st.lists(st.tuples(st.sampled_from(list(_SETTINGS)), st.sampled_from(ODD)), max_size=3)
)
def test_any_contender_is_taken_or_refused(method, drawn):
    text = ":".join([method, *(f"{name}={value}" for name, value in drawn)])
    try:
        assert contender_run("rte", text, 1, "minilm", {}).method == method
    except ValueError as error:
        assert str(error)
