"""Every row of the papers' tables is a command that lor2c takes, or says why not; and a row is run, stopped and gone on with."""

import json
import shlex

import pytest
import torch
import transformers as T
from conftest import ROOT, refused
from tiny import ENCODER
from transformers import AutoTokenizer

from lor2c.cli.main import main, make_parser
from lor2c.cli.many import run_many
from lor2c.data.base import demo_model
from lor2c.data.tasks import TASKS
from lor2c.experiments.compare import Comparison, look_over
from lor2c.experiments.papers import experiments, prepare_experiment, runs_of

ROWS = [(e, name) for e in experiments().values() for name in e.rows]


@pytest.mark.parametrize("size", ["cpu", "full"])
def test_every_row_is_a_command_or_has_a_reason(size, capsys):
    for experiment, name in ROWS:
        row = experiment.rows[name]
        command = ["paper", experiment.name, "--row", name, "--size", size, "--dry-run"]
        # There is no small vision transformer on the package index.
        command += ["--model", "folder"] if size == "cpu" and experiment.cpu.get("model") == "" else []
        if row.run:
            main(command)
            said = capsys.readouterr().out
            assert said.count(f"  {name}  method ") == len(experiment.tasks) * len(experiment.seeds), (name, said)
        elif row.command:
            lor2c, *arguments = shlex.split(row.command)
            assert lor2c == "lor2c" and make_parser([arguments[0]]).parse_args(arguments).run
            if arguments[0] == "paper":
                main([*arguments, "--dry-run"])
        else:
            assert row.why in refused(capsys, *command)
    for experiment in experiments().values():
        if experiment.why:
            assert experiment.why in refused(capsys, "paper", experiment.name, "--size", size)
        if experiment.then:
            assert make_parser(["eval"]).parse_args(shlex.split(experiment.then)[1:]).run


def test_every_table_and_figure_is_there():
    """Of LoR2C two tables and seven figures, of ResLoRA nine and seven, of RM-LoRA five and two."""
    shown = {"LoR2C": set(), "ResLoRA": set(), "RM-LoRA": set()}
    for one in experiments().values():
        text = one.shows.replace("Fig. ", "Figure ").replace("Table II", "Table 2").replace("Table I", "Table 1")
        kind = "Table"
        for word in text.replace(",", "").split():
            kind = word.rstrip("s") if not word.isdigit() and word != "and" else kind
            shown[one.paper] |= {f"{kind} {word}"} if word.isdigit() else set()
    wanted = {"LoR2C": (2, 7), "ResLoRA": (9, 7), "RM-LoRA": (5, 2)}
    for paper, (tables, figures) in wanted.items():
        assert shown[paper] == {f"Table {n + 1}" for n in range(tables)} | {f"Figure {n + 1}" for n in range(figures)}


def test_the_file_holds_together():
    for one in experiments().values():
        assert set(one.tasks) <= set(TASKS) and set(one.of_task) <= set(one.tasks), one.name
        heads = len(one.columns.split()) if one.columns else len(one.tasks)
        for name, row in one.rows.items():
            assert len(row.paper.split()) in {0, heads}, (one.name, name)
        assert all(len(entry) == 4 for entry in one.differs)
        for page in (word.strip(";:,.") for row in [one, *one.rows.values()] for word in row.why.split() if "/" in word):
            assert (ROOT / page).exists(), page


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A random BERT of two narrow layers, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = T.BertConfig(**{**ENCODER, "vocab_size": 30_522, "num_hidden_layers": 2})
    T.BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model()).save_pretrained(folder)
    return str(folder)


def test_rows_are_run_and_gone_on_with(base, glue_data, tmp_path, capsys):
    """A second command with one more row trains that row alone; records are those of ordinary runs."""
    command = ["paper", "lor2c-table1", "--tasks", "sst2", "--size", "cpu", "--model", base, "--data-dir", str(glue_data)]
    command += ["--max-train-samples", "32", "--device", "cpu", "--output-dir", str(tmp_path), "--row", "LoR2C"]
    main(command)
    said = capsys.readouterr().out
    assert f"model: {base}, a folder" in said and "LoR2C: 94.3 89.2 62.6 92.3 81.2 90.8 85.1" in said
    first = (tmp_path / "sst2/lor2c/seed-17/record.json").read_text()
    main([*command, "--row", "LoRA"])
    assert "1 of 2 runs were finished earlier" in capsys.readouterr().out
    record = json.loads(first)
    assert record["hyper_parameters"]["epochs"] == 3 and record["hyper_parameters"]["rank"] == 8
    assert (tmp_path / "sst2/lor2c/seed-17/record.json").read_text() == first
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:4]] == ["| LoR2C", "| LoRA"]
    about = json.loads((tmp_path / "compare.json").read_text())
    assert about["experiment"] == "lor2c-table1" and set(about["paper"]) == {"LoR2C", "LoRA"}
    assert set(about["runs"]) == {"sst2/lor2c/seed-17", "sst2/lora/seed-17"} and not about["failed"]


def test_two_names_of_one_run_are_refused(base, glue_data, tmp_path):
    one = experiments()["lor2c-table1"]
    asked = dict(tasks=["sst2"], rows=["LoRA"], size="cpu", model=base, data_dir=str(glue_data))
    comparison = prepare_experiment(one, tmp_path, **asked)
    [(place, run)] = comparison.runs.items()
    assert comparison.about["paper"] == {"LoRA": one.rows["LoRA"].paper} and run == runs_of(one, **asked)[0][place]
    with pytest.raises(ValueError, match="are the same run"):
        look_over(Comparison(tmp_path, {}, {place: run, "other": run}, {place: "LoRA", "other": "LoRA again"}))
    args = make_parser(["paper"]).parse_args(["paper", one.name])
    args.jobs, args.executor = 0, None
    with pytest.raises(SystemExit) as end:
        run_many(args, lambda: comparison, str)
    assert end.value.code == 2


def test_a_name_too_long_for_a_folder_is_a_name(capsys):
    main(["paper", "lor2c-table1", "--tasks", "rte", "--size", "cpu", "--model", "a" * 300, "--dry-run"])
    assert "aaa, from the hub" in capsys.readouterr().out
