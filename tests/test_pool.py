"""Many runs: processes are renewed now and then. What they do when killed is in test_sweep."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lor2c import pool
from lor2c.run import demo_run


def test_processes_are_renewed(monkeypatch):
    """Two at a time, three runs each: nine runs take two sets of processes, and each run is trained once."""
    sets = []

    def in_processes(todo, jobs):
        sets.append((list(todo), jobs))
        return ((folder, {}) for folder in todo)

    monkeypatch.setattr(pool, "in_processes", in_processes)
    monkeypatch.setattr(pool, "RUNS_OF_A_PROCESS", 3)
    todo = {Path(str(seed)): demo_run("head", seed=seed) for seed in range(9)}
    ended = [folder for folder, _ in pool.results(todo, 2)]
    assert [(len(folders), jobs) for folders, jobs in sets] == [(6, 2), (3, 2)]
    assert ended == list(todo)


def test_what_a_lost_process_leaves_is_trained(tmp_path):
    """One of two processes is killed while it trains: the runs of both are trained all the same."""
    small = demo_run("head", max_train_samples=32, epochs=1, batch_size=8, device="cpu")
    todo = {tmp_path / str(seed): replace(small, seed=seed) for seed in (1, 2)}
    killed = []

    def kill_one() -> None:
        while not list(tmp_path.glob("*/run.json")):
            time.sleep(0.01)
        killed.append(
            next(p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline()))
        )
        killed[0].kill()

    thread = threading.Thread(target=kill_one)
    thread.start()
    ended = {folder: result for folder, result, _ in pool.outcomes(todo, jobs=2)}
    thread.join()
    assert killed and [ended[folder]["seed"] for folder in todo] == [1, 2]


@pytest.mark.parametrize("jobs, asked", [(4, [(4, 9), (2, 5), (1, 5), (1, 4)]), (1, [(1, 9), (1, 4)])])
def test_the_run_that_loses_its_process_alone_has_failed(monkeypatch, capsys, jobs, asked):
    """A run that is too large takes all others with it, in ever fewer processes, until it is alone."""
    seen = []

    def until_one_is_lost(todo, jobs):
        seen.append((jobs, len(todo)))
        for folder in todo:
            if folder == Path("large"):
                return
            yield folder, {}

    monkeypatch.setattr(pool, "until_one_is_lost", until_one_is_lost)
    todo = {Path(name): demo_run("head") for name in [*"abcd", "large", *"efgh"]}
    ended = dict(pool.in_processes(todo, jobs))
    assert ended.pop(Path("large")).startswith(pool.LOST) and all(record == {} for record in ended.values())
    assert len(ended) == 8 and seen == asked
