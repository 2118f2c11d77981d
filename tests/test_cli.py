"""The command line in processes of its own: killed and resumed, damaged, out of reach."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lor2c.cli import main
from lor2c.data import demo_model, load_demo
from lor2c.run import glue_run
from lor2c.train import is_complete, last_complete_checkpoint, prepare

RUN = "glue --task sst2 --model minilm --epochs 3 --batch-size 16 --max-length 32 --lr 0.002 --seed 3 --device cpu".split()


@pytest.fixture(scope="session")
def glue_data(tmp_path_factory) -> Path:
    """A GLUE folder with a small sst2 made of real snippets."""
    folder = tmp_path_factory.mktemp("glue") / "sst2"
    folder.mkdir()
    demo = load_demo()
    for split, rows in (("train", 128), ("validation", 64)):
        demo[split].select(range(rows)).rename_column("text", "sentence").to_parquet(folder / f"{split}.parquet")
    return folder.parent


def start(*arguments: str | Path, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "lor2c.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(*arguments: str | Path, **kwargs) -> subprocess.CompletedProcess:
    process = start(*arguments, **kwargs)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def result(folder: Path) -> tuple[dict, dict]:
    record = json.loads((folder / "record.json").read_text())
    return record, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def undisturbed(glue_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    done = finish(*RUN, "--data-dir", glue_data, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "epoch 3 of 3" in done.stdout and "about " in done.stdout and f"record: {folder}" in done.stdout
    return folder


def test_a_run_leaves_a_record_and_an_adapter(undisturbed):
    record, tensors = result(undisturbed)
    assert sorted(p.name for p in undisturbed.iterdir()) == ["adapter", "record.json", "run.json"]
    assert (record["method"], record["task"], record["seed"]) == ("lor2c", "sst2", 3)
    assert record["adapter_parameters"] == 36_864 and record["trainable_parameters"] == 37_634
    assert [e["epoch"] for e in record["history"]] == [1.0, 2.0, 3.0] and record["metrics"]["last"]["epoch"] == 3.0
    assert record["metrics"]["best"] == max(record["history"], key=lambda e: e["accuracy"])
    assert {"train_loss", "loss", "accuracy"} <= record["history"][0].keys()
    assert record["hyper_parameters"]["lr"] == 0.002 and record["versions"]["torch"] == torch.__version__
    assert sum(t.numel() for k, t in tensors.items() if "lor2c_A" in k or "lor2c_B" in k) == 36_864


def test_killed_and_resumed_is_the_undisturbed_run(glue_data, undisturbed, tmp_path):
    """SIGKILL after an epoch's checkpoint; --resume ends with the same bits and the same history."""
    folder = tmp_path / "run"
    arguments = (*RUN, "--data-dir", glue_data, "--output-dir", folder)
    process = start(*arguments)
    deadline = time.monotonic() + 200
    while not last_complete_checkpoint(folder / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "record.json").exists() and not (folder / "adapter").exists()

    again = finish(*arguments)  # without --resume: refused, nothing overwritten
    assert again.returncode == 2 and "holds an unfinished run: add --resume" in again.stderr
    other = finish(*arguments, "--resume", "--rank", "4")
    assert other.returncode == 2 and "rank was 8, now 4" in other.stderr

    done = finish(*arguments, "--resume")
    assert done.returncode == 0 and "going on from checkpoint-" in done.stdout, done.stderr
    (record, tensors), (want, wanted) = result(folder), result(undisturbed)
    assert record["history"] == want["history"] and record["metrics"] == want["metrics"]
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[k], wanted[k]) for k in wanted)
    assert finish(*arguments, "--resume").stdout.count("best epoch") == 1  # finished: its record, nothing trained


def test_only_complete_checkpoints_are_taken(tmp_path):
    """A checkpoint cut off at any point of its writing is passed over for the one before."""
    from test_contract import adapted
    from tiny import batch
    from transformers import Trainer, TrainingArguments

    rows = [{k: v[0] for k, v in batch("BERT").items()}] * 4
    args = TrainingArguments(
        tmp_path, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps"
    )
    Trainer(adapted("BERT"), args, train_dataset=rows).train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert last_complete_checkpoint(tmp_path) == second and is_complete(first)
    needed = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    for name in needed:
        shutil.copytree(second, tmp_path / "kept")
        (second / name).unlink()
        assert last_complete_checkpoint(tmp_path) == first, f"{name} missing"
        shutil.rmtree(second)
        (tmp_path / "kept").rename(second)
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        whole = (second / name).read_bytes()
        (second / name).write_bytes(whole[: len(whole) // 2])
        assert last_complete_checkpoint(tmp_path) == first, f"{name} cut off"
        (second / name).write_bytes(whole)
    assert last_complete_checkpoint(tmp_path) == second
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def refused(capsys, *arguments: str | Path) -> str:
    """The one line that a wrong input gets, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("lor2c: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--task", "imdb"], "'imdb'"),
        (["--method", "dora"], "unknown method 'dora': choose one of head, full, lora, lor2c"),
        (["--rank", "0"], "rank must be above 0, found 0"),
        (["--epochs", "-1"], "epochs must be above 0, found -1"),
        (["--dropout", "1.5"], "dropout must be at least 0 and below 1"),
        (["--precision", "fp8"], "unknown precision 'fp8'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--max-length", "2"], "max_length"),
        (["--model", "no-such/model"], "pass the path of a local model"),
        (["--task", "rte"], "rte"),
    ],
    ids=lambda v: v[0].removeprefix("--") + "=" + v[1] if isinstance(v, list) else "",
)
def test_wrong_input_is_one_line(capsys, glue_data, tmp_path, changes, message):
    error = refused(capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", *changes)
    assert message.lower() in error.lower()
    assert not (tmp_path / "run").exists()


def test_no_network_and_no_cache(tmp_path):
    """A model and data that only the hub has: a sentence each, soon, and exit code 2."""
    dead = dict(os.environ, HF_HOME=str(tmp_path), HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    began = time.monotonic()
    model = finish("glue", "--task", "rte", "--model", "roberta-base", "--output-dir", tmp_path / "run", env=dead)
    data = finish("glue", "--task", "rte", "--model", "minilm", "--output-dir", tmp_path / "run", env=dead)
    for done, what in ((model, "roberta-base"), (data, "data-dir|data folder|data_dir")):
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and re.search(what, done.stderr), done.stderr
    assert time.monotonic() - began < 100 and not (tmp_path / "run").exists()


def test_a_model_of_another_kind_of_folder(capsys, glue_data, tmp_path):
    (tmp_path / "empty").mkdir()
    error = refused(
        capsys, *RUN, "--data-dir", glue_data, "--output-dir", tmp_path / "run", "--model", tmp_path / "empty"
    )
    assert "is a folder without a config.json" in error


def test_inspect(capsys, undisturbed, tmp_path):
    main(["inspect", str(undisturbed / "adapter")])
    out = capsys.readouterr().out
    assert demo_model() in out and "36,864 in residuals, 770 in head" in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  layers")] == [
        f"{i}..{i}" for i in range(6)
    ]
    cut = tmp_path / "cut"
    shutil.copytree(undisturbed / "adapter", cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "damaged" in refused(capsys, "inspect", cut)
    assert "adapter_config.json is missing" in refused(capsys, "inspect", tmp_path)


def test_usage_errors_exit_with_2(capsys):
    for arguments in ([], ["glue"], ["glue", "--task", "rte", "--rank", "x"], ["--no-such-flag"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    for command in (["--help"], ["demo", "--help"], ["glue", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
    assert "--max-train-samples" in capsys.readouterr().out


def test_every_method_and_regression(glue_data, tmp_path):
    """Each method trains, saves and is read back; MNLI's two validation sets are both scored."""
    demo = load_demo()
    folder = tmp_path / "glue" / "mnli"
    folder.mkdir(parents=True)
    rows = demo["train"].select(range(48)).rename_column("text", "premise")
    rows = rows.add_column("hypothesis", rows["premise"])
    for split in ("train", "validation_matched", "validation_mismatched"):
        rows.to_parquet(folder / f"{split}.parquet")
    changes = dict(
        epochs=1, batch_size=16, max_length=32, max_train_samples=32, device="cpu", data_dir=str(folder.parent)
    )
    from lor2c.train import carry_out

    for method in ("head", "full", "lora", "lor2c"):
        job = prepare(glue_run("mnli", method, demo_model(), **changes), tmp_path / method)
        record = carry_out(job)
        assert record["metrics"]["chosen_by"] == "matched_accuracy"
        assert {"matched_accuracy", "mismatched_accuracy"} <= record["metrics"]["best"].keys()
        kept = {"full": "model"}.get(method, "adapter")
        assert (tmp_path / method / kept).is_dir() and record["trainable_parameters"] > 0
