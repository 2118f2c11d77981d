"""The grid of limits: killed and gone on with, several cells at a time, what cannot be reached, what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lor2c.cli.main import main
from lor2c.disk.checkpoints import last_complete_checkpoint
from lor2c.experiments.compare import carry_out_comparison
from lor2c.experiments.sweep import cells, prepare_sweep, sweep
from lor2c.maths.layout import layers_needed
from lor2c.plots.grid import plot_grid
from lor2c.plots.runs import save_picture

FLAGS = (
    "sweep --task sst2 --model minilm --max-merges 0,2 --max-injections 0-1 --epochs 2 --batch-size 16 --max-length 16 "
    "--max-train-samples 64 --lr 0.01 --seed 3 --schedule fractional --device cpu"
).split()
NAMES = [f"sst2/imlor2c-max_merges-{m}-max_injections-{i}/seed-3" for m, i in [(0, 0), (2, 0), (0, 1), (2, 1)]]


@pytest.fixture(scope="module")
def base(glue_data):
    """What all cells share."""
    return dict(
        task="sst2", model="minilm", epochs=2, batch_size=16, max_length=16, max_train_samples=64, lr=0.01, seed=3,
        schedule="fractional", device="cpu", data_dir=str(glue_data),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory) -> Path:
    """The grid of the tests, trained without interruption in this process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "grid"
    records = sweep(merges=[0, 2], injections=[0, 1], output_dir=folder, **base)
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
    found = {name for name in NAMES if (folder / name / "checkpoints").is_dir()} - stamps(folder).keys()
    return sorted(name for name in found if last_complete_checkpoint(folder / name / "checkpoints"))


def stamps(folder: Path) -> dict[str, int]:
    finished = [folder / name / "record.json" for name in NAMES]
    return {path.parent.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in finished if path.exists()}


def test_a_sweep_leaves_its_grid(undisturbed):
    assert sorted(p.name for p in undisturbed.iterdir()) == ["compare.json", "grid.png", "sst2", "table.md"]
    assert {p.parent.relative_to(undisturbed).as_posix() for p in undisturbed.rglob("record.json")} == {*NAMES}
    grid = json.loads((undisturbed / "compare.json").read_text())
    assert list(grid["runs"]) == NAMES and grid["layers"] == 6 and grid["failed"] == {} and grid["asked"] == 4
    cells = grid["runs"].values()
    assert [(cell["merges"], cell["injections"]) for cell in cells] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert [(cell["max_merges"], cell["max_injections"]) for cell in cells] == [(0, 0), (2, 0), (0, 1), (2, 1)]
    assert grid["runs"][grid["best"]["sst2"]]["accuracy"] == max(cell["accuracy"] for cell in cells)
    assert "epoch 2 of 2" in (undisturbed / NAMES[3] / "log.txt").read_text()


def test_commands_share_a_folder(glue_data, undisturbed, tmp_path):
    """Three commands, one killed amid a cell: the others train each cell once, go on with its cell, and all know all records."""
    folder = tmp_path / "grid"
    command = (*FLAGS, "--data-dir", glue_data, "--output-dir", folder)
    workers = [start(*command) for _ in range(3)]
    wait_for(workers[0], lambda: begun(folder))
    workers[0].kill()
    ended = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL, 0, 0], ended
    assert_same(folder, undisturbed)
    begins = [p.read_text().count("trainable parameters") for p in folder.rglob("log.txt")]
    assert len(begins) == 4 and 4 <= sum(begins) <= 5
    assert json.loads((folder / "compare.json").read_text())["failed"] == {}
    assert all("best of 4: " in out for out, _ in ended[1:])
    assert [p.name for p in folder.iterdir() if p.name.endswith((".part", ".lock"))] == []


def test_an_executor_trains_them(base, undisturbed, tmp_path):
    """Anything that follows concurrent.futures: here threads, which a cluster's executor is used like."""
    with ThreadPoolExecutor(1) as executor:
        folder = tmp_path / "grid"
        carry_out_comparison(prepare_sweep(merges=[0], injections=[0, 1], output_dir=folder, **base), executor=executor)
    assert_same(folder, undisturbed, [NAMES[0], NAMES[2]])


def test_killed_in_the_middle_and_gone_on_with(glue_data, undisturbed, tmp_path):
    """SIGKILL with cells finished and begun; its processes end too, and the command ends with the undisturbed records."""
    folder = tmp_path / "grid"
    command = (*FLAGS, "--data-dir", glue_data, "--output-dir", folder)
    process = start(*command, "--jobs", "2")
    wait_for(process, lambda: {*NAMES[2:]} & {*begun(folder)})  # the first two are done, or nearly so
    process.kill()
    process.communicate()
    wait_until_gone(process)
    before, left = stamps(folder), begun(folder)
    listed = json.loads((folder / "compare.json").read_text())["runs"]
    assert 1 <= len(before) <= 3 and left and {*listed} <= before.keys()

    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"{len(before)} of 4 runs were finished earlier" in out
    assert out.count("adapter parameters  (") == 4 - len(before)
    for name in left:
        assert "going on from checkpoint-" in (folder / name / "log.txt").read_text()
    assert f"picture: {folder / 'grid.png'}" in out and f"best of 4: {NAMES[0].partition('-')[0]}" in out
    assert {name: stamps(folder)[name] for name in before} == before
    assert_same(folder, undisturbed)


def test_two_at_a_time(glue_data, undisturbed, tmp_path):
    """Ctrl-C ends all processes and is one line; what a lost process leaves is trained all the same, in fewer."""
    folder = tmp_path / "grid"
    command = (*FLAGS, "--max-injections", "0", "--data-dir", glue_data, "--output-dir", folder, "--jobs", "2")
    process = start(*command)
    wait_for(process, lambda: len(list(folder.rglob("log.txt"))) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "lor2c: interrupted; the same command goes on", err
    wait_until_gone(process)

    process = start(*command)

    def workers() -> list[psutil.Process]:
        return [p for p in psutil.Process(process.pid).children() if p.status() != psutil.STATUS_ZOMBIE]

    wait_for(process, lambda: sum("popen_loky" in " ".join(p.cmdline()) for p in workers()) == 2)
    next(p for p in workers() if "popen_loky" in " ".join(p.cmdline())).kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "going on with 1 at a time" in out and "best of 2" in out, err
    assert_same(folder, undisturbed, NAMES[:2])


def test_a_failing_cell_does_not_lose_the_others(base, undisturbed, tmp_path, capsys):
    asked = dict(merges=[0, 2], injections=[0], output_dir=tmp_path / "grid", **base)
    grid = prepare_sweep(**asked)
    in_the_way = tmp_path / "grid" / NAMES[0] / "checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("mine")
    with pytest.raises(RuntimeError, match=f"1 of 2 runs failed, the others are done: {NAMES[0]}: .*checkpoints"):
        carry_out_comparison(grid)
    assert f"{NAMES[0]}  failed: " in capsys.readouterr().out
    assert_same(tmp_path / "grid", undisturbed, [NAMES[1]])
    in_the_way.unlink()
    records = sweep(**asked)
    assert len(records) == 2 and json.loads((tmp_path / "grid" / "compare.json").read_text())["failed"] == {}


def test_cells_and_their_picture(undisturbed, tmp_path):
    """What six layers cannot reach has no run, and is hatched; what has not been run is blank; the best is framed."""
    reached = cells(range(7), range(7), 6)
    assert {*reached} == {(m, i) for m in range(7) for i in range(7) if layers_needed(m, i) <= 6}
    assert len(reached) == 22 and len(cells(range(7), range(7), 12)) == 48
    settings = [json.loads((undisturbed / name / "run.json").read_text()) for name in NAMES]
    apart = [{k: v for k, v in one.items() if k not in ("max_merges", "max_injections")} for one in settings]
    assert all(one == apart[0] for one in apart)

    records = [json.loads((undisturbed / name / "record.json").read_text()) for name in NAMES]
    figure = plot_grid(records, range(7), range(7))
    [axes] = figure.axes
    assert sum(bool(patch.get_hatch()) for patch in axes.patches) == 49 - len(reached)
    assert len(axes.texts) == 4 and sum(not patch.get_fill() for patch in axes.patches) == 1
    save_picture(figure, tmp_path / "grid.png")
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--max-merges", "6-0"], "counts must be such as 0-6, 2 or 0,2,4, found '6-0'"),
        (["--max-injections", "some"], "found 'some'"),
        (["--max-merges", "4-6", "--max-injections", "4"], "no cell can be reached"),
        (["--jobs", "0"], "jobs must be a whole number of at least 1, found 0"),
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
    """Another sweep's, also where this one asks for none of its cells; a run's; a file; a cell that is damaged."""
    asked = dict(merges=[0, 2], injections=[0, 1], output_dir=undisturbed)
    damaged = tmp_path / "grid" / NAMES[0] / "run.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("[]")
    before = (undisturbed / "compare.json").read_bytes()
    for changed, message in (
        (dict(rank=4), "belongs to another sweep, .*: rank was 8, now 4"),
        (dict(rank=4, merges=[1]), "belongs to another sweep, .*: rank was 8, now 4"),
        (dict(output_dir=undisturbed / NAMES[0]), "holds a run, not a comparison"),
        (dict(output_dir=undisturbed / "grid.png"), "is a file"),
        (dict(output_dir=tmp_path / "grid"), "damaged"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_sweep(**(base | asked | changed))
    assert (undisturbed / "compare.json").read_bytes() == before
    settings = json.loads((undisturbed / NAMES[0] / "run.json").read_text())
    del settings["checkpointing"]  # a sweep of before there was such a setting
    damaged.write_text(json.dumps(settings))
    assert prepare_sweep(**base, merges=[0], injections=[0], output_dir=tmp_path / "grid").records == {}
    assert len(prepare_sweep(**(base | asked | dict(device="auto"))).records) == 4  # may differ
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="not for torchrun"):
        prepare_sweep(**base, **asked)
