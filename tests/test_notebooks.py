"""Every notebook runs from top to bottom in a fresh kernel."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, notebooks
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NEVER = re.compile(r"^\s*#\s*\|\s*eval:\s*false", re.M)
SLOW = re.compile(r"^\s*#\s*\|\s*slow\b", re.M)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def wanted(cell: nbformat.NotebookNode) -> bool:
    """Whether the test runs a cell: all but `#| eval: false`, and `#| slow` unless LOR2C_SLOW is set."""
    return not NEVER.search(cell.source) and (bool(os.environ.get("LOR2C_SLOW")) or not SLOW.search(cell.source))


# The others show less where there is no GLUE; no test asks the hub.
NEEDS_GLUE = {"nbs/tutorials/glue.ipynb", "nbs/tutorials/imlor2c.ipynb"}


def has_glue() -> bool:
    """Whether a GLUE folder is where the notebooks look for one."""
    return "LOR2C_GLUE_DIR" in os.environ or any((p / "shared/data/glue").is_dir() for p in ROOT.parents)


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to("nbs").with_suffix("").as_posix())
def test_notebook(path: Path) -> None:
    if path.as_posix() in NEEDS_GLUE and not has_glue():
        pytest.skip("needs GLUE: set LOR2C_GLUE_DIR to a folder with rte/train.parquet ...")
    nb = nbformat.read(ROOT / path, as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "code" or wanted(cell)]
    folder = {"metadata": {"path": ROOT / path.parent}}
    client = NotebookClient(nb, timeout=None, kernel_name="python3", resources=folder)
    failure = ""
    try:
        client.execute()
    except CellExecutionError as error:
        failure = ANSI.sub("", str(error))  # the cell's source, then its error
    if failure:
        pytest.fail(f"{path}: {failure}", pytrace=False)
