"""A settings file gives the same run as the flags; what a run reports can be read back from TensorBoard's own file."""

import dataclasses

import pytest
import yaml
from conftest import refused

from lor2c.cli.main import COMMANDS, main
from lor2c.runs.recipes import make_run
from lor2c.runs.train import train

GLUE = "glue --task sst2 --model minilm --method imlor2c --max-merges 1 --max-injections 1 --lr 3e-4 --rm --seed 5".split()


class Reached(Exception):
    """The run that a command would carry out."""


@pytest.fixture
def run_of(monkeypatch):
    def prepare(run, *_):
        raise Reached(run)

    monkeypatch.setattr("lor2c.cli.train.prepare", prepare)

    def run_of(*command):
        with pytest.raises(Reached) as reached:
            main([*map(str, command)])
        return reached.value.args[0]

    return run_of


def test_a_file_is_the_flags(run_of, tmp_path):
    """Saved, read, and changed by a flag beside it."""
    flags = run_of(*GLUE, "--output-dir", tmp_path / "run")
    main([*GLUE, "--output-dir", str(tmp_path / "run"), "--save-config", str(tmp_path / "run.yaml")])
    assert run_of("glue", "--config", tmp_path / "run.yaml") == flags
    assert run_of("glue", f"--config={tmp_path / 'run.yaml'}", "--seed=6") == dataclasses.replace(flags, seed=6)
    (tmp_path / "short.yaml").write_text("task: sst2\nmodel: minilm\nmethod: lor2c\noutput_dir: new\nlr: 3e-4\n")
    assert run_of("glue", "--config", tmp_path / "short.yaml", "--rank", "4").rank == 4
    assert not (tmp_path / "run").exists()


REQUIRED = {  # what a command cannot do without
    "glue": "--task rte --model minilm --output-dir new",
    "squad": "--model minilm --output-dir new",
    "reason": "--task gsm8k --model gemma-270m --output-dir new",
    "images": "--task pictures --model vit --output-dir new",
    "alpaca": "--model gemma-270m --output-dir new",
    "compare": "--tasks rte --methods lora --output-dir new",
    "sweep": "--task rte --model minilm --output-dir new",
    "paper": "lor2c-table1 --row LoRA --row LoR2C",
    "generate": "adapter --prompt Why?",
    "eval": "adapter --tasks mmlu",
    "shrink": "run --output-dir new",
    "export": "adapter --to new",
    "inspect": "adapter",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_saves_it_reads(command, tmp_path):
    """Saved, read back and saved again, a settings file says the same."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    main([command, *REQUIRED.get(command, "").split(), "--save-config", str(first)])
    main([command, "--config", str(first), "--save-config", str(second)])
    assert yaml.safe_load(first.read_text()) == yaml.safe_load(second.read_text())


def test_a_folder_repeats_its_run(run_of, tmp_path, monkeypatch):
    monkeypatch.setattr("lor2c.cli.train.run_one", lambda job: None)
    made = []
    monkeypatch.setattr("lor2c.cli.train.prepare", lambda run, *_: made.append(run))
    main([*GLUE, "--output-dir", str(tmp_path / "run"), "--resume"])
    main(["glue", "--config", str(tmp_path / "run/config.yaml"), "--output-dir", str(tmp_path / "again")])
    assert made[0] == made[1] and (tmp_path / "again/config.yaml").exists()
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (settings["lr"], settings["rm"], settings["output-dir"]) == (3e-4, True, str(tmp_path / "run"))
    assert not {"resume", "config", "command"} & settings.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_what_no_command_can_take_is_one_line(command, capsys, tmp_path):
    for content, message in [
        ("no-such-setting: 1", "has no setting 'no-such-setting', choose from"),
        ("- 1", "must hold lines such as"),
        ("a: {", "is no YAML"),
    ]:
        (tmp_path / "run.yaml").write_text(content)
        assert message in refused(capsys, command, "--config", tmp_path / "run.yaml")
    assert "no-file" in refused(capsys, command, "--config", tmp_path / "no-file")


def test_tensorboard_gets_the_structure(glue_data, tmp_path):
    """Its event file outlives the checkpoints, and holds SFS, ranks, orthogonality, moves and counts over steps."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    changes = dict(max_train_samples=32, batch_size=8, epochs=2, max_length=16, max_merges=1, max_injections=1, lr=0.01)
    changes |= dict(schedule="fractional", data_dir=str(glue_data), device="cpu", report_to="tensorboard")
    record = train(make_run("sst2", "imlor2c", "minilm", **changes), tmp_path / "run")
    [file] = (tmp_path / "run/logs").glob("events.*")
    events = reading.EventAccumulator(str(file)).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert last["train/lor2c/trainable_parameters"] == record["trainable_parameters"]
    assert (last["train/lor2c/merges"], last["train/lor2c/injections"]) == (1, 1)
    spans = record["structure"][-1]["spans"]
    for name in ("sfs", "rank"):
        now = {e.step for a, _ in spans for e in events.Scalars(f"train/lor2c/{name}/{a:02}")}
        moved = {entry["step"] for entry in record["structure"] if entry["move"]}
        assert moved <= now and max(now) == record["steps"]
    assert last["train/lor2c/orthogonality"] > 0 and last["eval/accuracy"] == pytest.approx(
        record["history"][-1]["accuracy"]
    )
