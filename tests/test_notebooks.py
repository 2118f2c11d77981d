"""Every notebook runs from top to bottom in a fresh kernel."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
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


# The others show less where their data are not there; no test asks the hub.
NEEDS = {
    "nbs/tutorials/glue.ipynb": ("glue", "LOR2C_GLUE_DIR"),
    "nbs/tutorials/imlor2c.ipynb": ("glue", "LOR2C_GLUE_DIR"),
    "nbs/tutorials/alpaca.ipynb": ("alpaca-cleaned", "LOR2C_ALPACA_DIR"),
    "nbs/tutorials/squad.ipynb": ("squad", "LOR2C_SQUAD_DIR"),
}


LIBRARIES = {"nbs/howto/draw.ipynb": "diffusers"}


# Pages that only show what records hold: what they store is what they print.
SHOW_RECORDS = ("nbs/index.ipynb", "nbs/works.ipynb", "nbs/results/")


def printed(nb: nbformat.NotebookNode) -> list[str]:
    """What the code cells put out as text or tables, warnings apart."""
    outs = [out for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs if out.get("name") != "stderr"]
    return [out.get("text") or out.get("data", {}).get("text/markdown", "") for out in outs]


def is_there(folder: str, variable: str) -> bool:
    """Whether data are where the notebooks look for them."""
    return variable in os.environ or any((p / "shared/data" / folder).is_dir() for p in ROOT.parents)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str] | None]:
    """The command that starts a kernel with torch and transformers loaded; None where processes aren't forked."""
    if sys.platform != "linux":
        yield None
        return
    path = tmp_path_factory.mktemp("kernels") / "socket"
    command = [sys.executable, str(ROOT / "tests/workers/kernels.py"), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as loaded:
        while not path.exists() and loaded.poll() is None:
            time.sleep(0.1)
        yield [*command, "-f", "{connection_file}"]
        loaded.communicate()


@pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.relative_to("nbs").with_suffix("").as_posix())
def test_notebook(path: Path, kernels: list[str] | None) -> None:
    if (needed := NEEDS.get(path.as_posix())) and not is_there(*needed):
        pytest.skip(f"needs data: set {needed[1]} to a folder such as {needed[0]}, see the page")
    if library := LIBRARIES.get(path.as_posix()):
        pytest.importorskip(library)
    nb = nbformat.read(ROOT / path, as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type != "code" or wanted(cell)]
    stored = printed(nb)
    folder = {"metadata": {"path": ROOT / path.parent}}
    client = NotebookClient(nb, timeout=None, kernel_name="python3", resources=folder)
    manager = client.create_kernel_manager()
    manager.kernel_spec.argv = kernels or manager.kernel_spec.argv
    failure = ""
    try:
        client.execute()
    except CellExecutionError as error:
        failure = ANSI.sub("", str(error))  # the cell's source, then its error
    if failure:
        pytest.fail(f"{path}: {failure}", pytrace=False)
    if path.as_posix().startswith(SHOW_RECORDS):
        assert printed(nb) == stored, "its outputs are not what it prints now: run it and save it"
