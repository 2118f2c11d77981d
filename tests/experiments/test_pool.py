"""Many runs: processes are renewed now and then. What they do when killed is in test_sweep."""

from pathlib import Path

import pytest
from lor2c.runs.recipes import make_run

from lor2c.experiments import pool


def test_processes_are_renewed(monkeypatch):
    """Two at a time, three runs each: nine runs take two sets of processes, and each run is trained once."""
    sets = []

    def in_processes(todo, jobs):
        sets.append((list(todo), jobs))
        return ((folder, {}) for folder in todo)

    monkeypatch.setattr(pool, "in_processes", in_processes)
    monkeypatch.setattr(pool, "RUNS_OF_A_PROCESS", 3)
    todo = {Path(str(seed)): make_run("demo", "head", seed=seed) for seed in range(9)}
    ended = [folder for folder, _ in pool.results(todo, 2)]
    assert [(len(folders), jobs) for folders, jobs in sets] == [(6, 2), (3, 2)]
    assert ended == list(todo)


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
    todo = {Path(name): make_run("demo", "head") for name in [*"abcd", "large", *"efgh"]}
    ended = dict(pool.in_processes(todo, jobs))
    assert ended.pop(Path("large")).startswith(pool.LOST) and all(record == {} for record in ended.values())
    assert len(ended) == 8 and seen == asked
