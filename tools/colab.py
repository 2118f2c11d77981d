"""Put into each notebook the hidden cell that sets it up in Colab, where a page is opened without its package."""

import json
import re
from pathlib import Path

from nbdev.config import get_config

# What pages run that not every page needs: an extra of lor2c, or a package, by what stands in their code.
EXTRAS = {"gemma": r"\bgemma", "eval": r"\blm_eval\b"}
PACKAGES = {"hypothesis": r"\bhypothesis\b", "torchao": r"\btorchao\b", "trl": r"\btrl\b"}
SETUP = """#| hide
#| eval: false
import os
import subprocess
import sys

if "google.colab" in sys.modules:  # Colab opens a page without its package and without the files beside it
    subprocess.run("test -d {home} || git clone -q {url} {home}", shell=True, check=True)
    subprocess.run("pip install -q {packages}", shell=True, check=True)
    os.chdir("{home}/{folder}")"""


def setup(path: Path, code: str) -> str:
    """The cell of a notebook whose other cells hold this code."""
    cfg = get_config()
    home = f"/content/{cfg.repo}"
    extras = ",".join(["demo", *(name for name, word in EXTRAS.items() if re.search(word, code))])
    more = [name for name, word in PACKAGES.items() if re.search(rf"^\s*(from|import) .*{word}", code, re.M)]
    packages = " ".join([f"'{home}[{extras}]'", *more])
    return SETUP.format(home=home, url=cfg.git_url, packages=packages, folder=path.parent.as_posix())


def with_setup(path: Path, nb: dict) -> dict:
    """A notebook with its cell: the second, below the title."""
    cells = [cell for cell in nb["cells"] if cell["id"] != "colab"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    source = setup(path, code).splitlines(keepends=True)
    cell = dict(cell_type="code", execution_count=None, id="colab", metadata={}, outputs=[], source=source)
    return {**nb, "cells": [cells[0], cell, *cells[1:]]}


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    for path in (root / "nbs").rglob("*.ipynb"):
        nb = json.loads(path.read_text("utf-8"))
        new = with_setup(path.relative_to(root), nb)
        if new != nb and ".ipynb_checkpoints" not in path.parts:
            path.write_text(json.dumps(new, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")
