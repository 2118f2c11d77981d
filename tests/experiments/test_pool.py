"""Many runs: processes are renewed when they have grown. What they do when killed is in test_sweep."""

import subprocess
import sys
from pathlib import Path

import pytest

from lor2c.experiments import pool
from lor2c.runs.recipes import make_run

SCRIPT = """
import os, sys, time
from pathlib import Path
from lor2c.experiments import pool
from lor2c.runs.recipes import make_run

def grow(run, folder, bar):
    "In place of a run: hold 400 MB more, and say which process does."
    sys.held = [*getattr(sys, "held", []), bytearray(os.urandom(1024) * 400_000)]
    time.sleep(1.1)  # loky looks once in a second
    return {"pid": os.getpid()}

pool._attempt = grow
ended = pool._in_processes({Path(str(seed)): make_run("demo", "head", seed=seed) for seed in range(3)}, 1)
print(*(f"{folder} {result['pid']}" for folder, result in ended))
"""


def test_processes_are_renewed(tmp_path):
    """Each run is trained once; the first run of a process is the measure for its next; loky's warning is not shown.

    A script needs no `if __name__ == "__main__":`.
    """
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, again, second = dict(zip(*[iter(done.stdout.split())] * 2, strict=True)).values()
    assert first == again != second and done.stdout.split()[::2] == ["0", "1", "2"]


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

    monkeypatch.setattr(pool, "_until_one_is_lost", until_one_is_lost)
    todo = {Path(name): make_run("demo", "head") for name in [*"abcd", "large", *"efgh"]}
    ended = dict(pool._in_processes(todo, jobs))
    assert ended.pop(Path("large")).startswith(pool._LOST) and all(record == {} for record in ended.values())
    assert len(ended) == 8 and seen == asked


ADDED = """
from dataclasses import replace
from pathlib import Path
from lor2c.data.demo import DEMO
from lor2c.data.tasks import add_task, find_task
from lor2c.experiments import pool
from lor2c.runs.recipes import make_run

def look(run, folder, bar):
    "In place of a run: look for its rows."
    return {"rows": find_task(run.task).rows(run)}

pool._attempt = look
add_task(replace(DEMO, name="mine", load=lambda run: [run.method]))
print(*(result["rows"] for _, result in pool._in_processes({Path(m): make_run("mine", m) for m in ("head", "lora")}, 2)))
"""


def test_processes_know_the_tasks_of_a_script(tmp_path):
    (tmp_path / "script.py").write_text(ADDED)
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["['head']", "['lora']"]
