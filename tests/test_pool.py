"""Many runs: processes are renewed now and then. What they do when killed is in test_sweep."""

from pathlib import Path

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
