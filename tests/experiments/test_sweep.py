"""The grid of limits: killed and gone on with, several cells at a time, what cannot be reached, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lor2c.cli.main import main
from lor2c.disk.checkpoints import last_complete_checkpoint
from lor2c.experiments.sweep import carry_out_sweep, cells, prepare_sweep, sweep
from lor2c.maths.layout import layers_needed
from lor2c.plots.grid import plot_grid
from lor2c.plots.runs import save_picture
from lor2c.runs.recipes import make_run

FLAGS = (
    "sweep --task sst2 --model minilm --max-merges 0,2 --max-injections 0-1 --epochs 2 --batch-size 16 --max-length 16 "
    "--max-train-samples 64 --lr 0.01 --seed 3 --schedule fractional --device cpu"
).split()
NAMES = ["m0-i0", "m2-i0", "m0-i1", "m2-i1"]


@pytest.fixture(scope="module")
def base(glue_data):
    return make_run(
        "sst2", "imlor2c", "minilm", max_merges=0, max_injections=0, epochs=2, batch_size=16, max_length=16,
        max_train_samples=64, lr=0.01, seed=3, schedule="fractional", device="cpu", data_dir=str(glue_data),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    """The grid of the tests, trained without interruption in this process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "grid"
    records = sweep(base, [0, 2], [0, 1], folder)
    assert [r["hyper_parameters"]["max_merges"] for r in records] == [0, 2, 0, 2]
    return folder


def start(*arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "lor2c", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process: subprocess.Popen, found) -> None:
    deadline = time.monotonic() + 200
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def wait_until_gone(process: subprocess.Popen) -> None:
    """Every process of its session has ended."""
    deadline = time.monotonic() + 30
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "a process of the sweep has outlived it"
        time.sleep(0.02)


def assert_same(folder: Path, other: Path, names: list[str] = NAMES) -> None:
    for name in names:
        ours, theirs = (json.loads((f / name / "record.json").read_text()) for f in (folder, other))
        for what in ("history", "metrics", "structure", "hyper_parameters", "adapter_parameters"):
            assert ours[what] == theirs[what], (name, what)
        ours, theirs = (load_file(f / name / "adapter" / "adapter_model.safetensors") for f in (folder, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), name


def begun(folder: Path) -> list[str]:
    """Cells that have a checkpoint and no record."""
    found = {path.parents[1].name for path in folder.glob("m*/checkpoints/checkpoint-*")} - stamps(folder).keys()
    return sorted(name for name in found if last_complete_checkpoint(folder / name / "checkpoints"))


def stamps(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("m*/record.json")}


def test_a_sweep_leaves_its_grid(undisturbed):
    assert sorted(p.name for p in undisturbed.iterdir()) == ["grid.json", "grid.png", *sorted(NAMES)]
    grid = json.loads((undisturbed / "grid.json").read_text())
    assert [cell["cell"] for cell in grid["cells"]] == NAMES and grid["layers"] == 6 and grid["failed"] == {}
    assert [(cell["merges"], cell["injections"]) for cell in grid["cells"]] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert grid["best"]["accuracy"] == max(cell["accuracy"] for cell in grid["cells"])
    assert "epoch 2 of 2" in (undisturbed / "m2-i1" / "log.txt").read_text()


def test_killed_in_the_middle_and_gone_on_with(glue_data, undisturbed, tmp_path):
    """SIGKILL with cells finished and begun; its processes end too, and the command ends with the undisturbed records."""
    folder = tmp_path / "grid"
    command = (*FLAGS, "--data-dir", glue_data, "--output-dir", folder)
    process = start(*command, "--jobs", "2")
    wait_for(process, lambda: {"m0-i1", "m2-i1"} & {*begun(folder)})  # the first two are done, or nearly so
    process.kill()
    process.communicate()
    wait_until_gone(process)
    before, left = stamps(folder), begun(folder)
    listed = [cell["cell"] for cell in json.loads((folder / "grid.json").read_text())["cells"]]
    assert 1 <= len(before) <= 3 and left and {*listed} <= before.keys()

    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{len(before)} of 4 cells were finished earlier" in out
    assert out.count("adapter parameters  (") == 4 - len(before)
    for name in left:
        assert "going on from checkpoint-" in (folder / name / "log.txt").read_text()
    assert f"picture: {folder / 'grid.png'}" in out and "best of 4: m" in out
    assert {name: stamps(folder)[name] for name in before} == before
    assert_same(folder, undisturbed)


def test_two_at_a_time(glue_data, undisturbed, tmp_path):
    """Ctrl-C ends all processes and is one line; what a lost process leaves is trained all the same, in fewer."""
    folder = tmp_path / "grid"
    command = (*FLAGS, "--max-injections", "0", "--data-dir", glue_data, "--output-dir", folder, "--jobs", "2")
    process = start(*command)
    wait_for(process, lambda: len(list(folder.glob("m*-i*/log.txt"))) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "lor2c: interrupted; the same command goes on", err
    wait_until_gone(process)

    process = start(*command)
    workers = psutil.Process(process.pid).children
    wait_for(process, lambda: sum("spawn_main" in " ".join(p.cmdline()) for p in workers()) == 2)
    next(p for p in workers() if "spawn_main" in " ".join(p.cmdline())).kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on with 1 at a time" in out and "best of 2" in out, err
    assert_same(folder, undisturbed, ["m0-i0", "m2-i0"])


def test_a_failing_cell_does_not_lose_the_others(base, undisturbed, tmp_path, capsys):
    grid = prepare_sweep(base, [0, 2], [0], tmp_path / "grid")
    in_the_way = tmp_path / "grid" / "m0-i0" / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("mine")
    with pytest.raises(RuntimeError, match="1 of 2 cells failed, the others are done: m0-i0: .*checkpoints"):
        carry_out_sweep(grid)
    assert "m0-i0  failed: " in capsys.readouterr().out
    assert_same(tmp_path / "grid", undisturbed, ["m2-i0"])
    in_the_way.unlink()
    records = sweep(base, [0, 2], [0], tmp_path / "grid")
    assert len(records) == 2 and json.loads((tmp_path / "grid" / "grid.json").read_text())["failed"] == {}


def test_cells_and_their_picture(base, undisturbed, tmp_path):
    """What six layers cannot reach has no run, and is hatched; what has not been run is blank; the best is framed."""
    runs = cells(base, range(7), range(7), 6)
    reached = {(run.max_merges, run.max_injections) for run in runs}
    assert reached == {(m, i) for m in range(7) for i in range(7) if layers_needed(m, i) <= 6}
    assert len(runs) == len(reached) == 22
    assert len(cells(base, range(7), range(7), 12)) == 48
    assert {replace(run, max_merges=0, max_injections=0) for run in runs} == {base}

    records = [json.loads((undisturbed / name / "record.json").read_text()) for name in NAMES]
    figure = plot_grid(records, range(7), range(7))
    [axes] = figure.axes
    assert sum(bool(patch.get_hatch()) for patch in axes.patches) == 49 - len(runs)
    assert len(axes.texts) == 4 and sum(not patch.get_fill() for patch in axes.patches) == 1
    save_picture(figure, tmp_path / "grid.png")
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--max-merges", "6-0"], "counts must be such as 0-6, 2 or 0,2,4, found '6-0'"),
        (["--max-injections", "some"], "found 'some'"),
        (["--max-merges", "4-6", "--max-injections", "4"], "no cell can be reached"),
        (["--jobs", "0"], "jobs must be at least 1, found 0"),
        (["--rank", "0"], "rank must be above 0"),
        (["--sfs-k", "8"], "k of SFS must be"),
        (["--task", "imdb"], "imdb"),
        (["--task", "rte"], "rte"),
        (["--device", "tpu"], "unknown device"),
    ],
    ids=lambda v: v[0].removeprefix("--") + "=" + v[1] if isinstance(v, list) else "",
)
def test_wrong_input_is_one_line(capsys, glue_data, tmp_path, changes, message):
    with pytest.raises(SystemExit) as end:
        main([*FLAGS, "--data-dir", str(glue_data), "--output-dir", str(tmp_path / "grid"), *changes])
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("lor2c: error: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "grid").exists()


def test_a_folder_of_something_else(base, undisturbed, monkeypatch, tmp_path):
    before = (undisturbed / "grid.json").read_bytes()
    for where, changed, message in (
        (undisturbed, dict(rank=4), "belongs to another sweep: rank was 8, now 4"),
        (undisturbed / "m0-i0", {}, "holds a run, not a sweep"),
        (undisturbed / "grid.png", {}, "is a file"),
        (tmp_path, {}, "damaged"),
    ):
        (tmp_path / "grid.json").write_text("[]")
        with pytest.raises(ValueError, match=message):
            prepare_sweep(replace(base, **changed), [0, 2], [0, 1], where)
    assert (undisturbed / "grid.json").read_bytes() == before
    grid = json.loads(before)
    del grid["settings"]["checkpointing"]  # a sweep of before there was such a setting
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    assert prepare_sweep(base, [0], [0], tmp_path).records == {}
    assert len(prepare_sweep(replace(base, device="auto"), [0, 2], [0, 1], undisturbed).records) == 4  # may differ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not for torchrun"):
        prepare_sweep(base, [0, 2], [0, 1], undisturbed)
