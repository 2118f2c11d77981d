"""Each notebook sets itself up in Colab, where it is opened without its package, and does nothing of that elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, notebooks

sys.path.insert(0, str(ROOT / "tools"))

from colab import with_setup  # noqa: E402


def read(path: Path) -> dict:
    return json.loads((ROOT / path).read_text("utf-8"))


def test_each_notebook_has_its_cell() -> None:
    lacking = [str(p) for p in notebooks() if with_setup(p, read(p)) != read(p)]
    assert lacking == [], "run `make export`"


def test_a_page_asks_for_what_it_runs() -> None:
    asked = {"howto/trl": "[demo]' trl", "tutorials/alpaca": "[demo,gemma]'", "api/inference/05_evaluate": ",eval]'"}
    for page, words in asked.items():
        assert words in "".join(read(Path(f"nbs/{page}.ipynb"))["cells"][1]["source"])


@pytest.mark.parametrize("in_colab", [True, False])
def test_the_cell(in_colab: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done.append(command))
    monkeypatch.setattr(os, "chdir", done.append)
    if in_colab:
        monkeypatch.setitem(sys.modules, "google.colab", sys)
    exec("".join(read(Path("nbs/api/maths/01_lowrank.ipynb"))["cells"][1]["source"]), {})
    here = "/content/lor2c"
    clone = f"test -d {here} || git clone -q https://github.com/lor2c/lor2c {here}"
    assert done == [clone, f"pip install -q '{here}[demo]'", f"{here}/nbs/api/maths"] * in_colab
