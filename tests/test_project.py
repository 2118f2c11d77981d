"""The repository keeps its own rules: what is generated is up to date, notebooks are clean, functions are short."""

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median

import pytest
from conftest import ROOT, copy_repository, notebooks, run

MODULES = sorted(p for p in (ROOT / "lor2c").glob("*.py") if p.name != "_modidx.py")
API = [p for p in notebooks() if p.parent.name == "api"]
TUTORIALS = [p for p in notebooks() if p.parent.name == "tutorials"]
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
each_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda p: p.stem)
each_api = pytest.mark.parametrize("path", API, ids=lambda p: p.stem)


def cells(path: Path, kind: str) -> list[dict]:
    return [c for c in json.loads((ROOT / path).read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(cell: dict) -> Iterator[str]:
    """The text of a cell's outputs, whatever their kind."""
    for out in cell["outputs"]:
        yield from ("".join(v) for k, v in out.get("data", {}).items() if k.startswith("text/"))
        yield from ("".join(out.get(k, "")) for k in ("text", "traceback"))


# What is generated is up to date


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every file's content and every link's target, by path."""
    return {
        p.relative_to(folder).as_posix(): f"-> {p.readlink()}" if p.is_symlink() else p.read_bytes()
        for p in folder.rglob("*")
        if p.is_symlink() or (p.is_file() and p.name not in ("nbdev.yml", "sidebar.yml"))  # nbdev's own, not committed
    }


def difference(before: dict, after: dict) -> list[str]:
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))


def test_export_leaves_no_difference(repository: Path) -> None:
    before = snapshot(repository)
    for module in (repository / "lor2c").glob("*.py"):
        if module.name != "__init__.py":  # a module whose notebook is gone must not survive
            module.unlink()
    run("nbdev_export", cwd=repository)
    assert difference(before, snapshot(repository)) == [], "run `make export`; edit notebooks, never lor2c/"


def test_clean_leaves_no_difference(repository: Path) -> None:
    before = snapshot(repository)
    run("nbdev_clean", cwd=repository)
    assert difference(before, snapshot(repository)) == [], "run `make export`"


def test_every_api_notebook_has_its_module() -> None:
    exported = {re.search(r"#\| *default_exp (\S+)", "\n".join(map(source, cells(p, "code"))))[1] for p in API}
    assert exported | {"__init__"} == {m.stem for m in MODULES}


def test_quarto_config_is_a_relative_link() -> None:
    assert (ROOT / "nbs/_quarto.yml").readlink() == Path("../_quarto.yml")


def test_readme_is_the_index_notebook() -> None:
    run("python", ROOT / "tools/readme.py", "--check", cwd=ROOT)


# Notebooks


@each_notebook
def test_sources_are_lists_of_lines(path: Path) -> None:
    for cell in chain(cells(path, "code"), cells(path, "markdown")):  # Quarto loses the line breaks of anything else
        assert isinstance(cell["source"], list)
        assert all(line.endswith("\n") and line.count("\n") == 1 for line in cell["source"][:-1]), source(cell)


@each_notebook
def test_outputs_name_no_machine_and_no_progress(path: Path) -> None:
    private = re.compile(rf"/(home|root|tmp|Users)/|site-packages|{re.escape(str(ROOT))}/|\r|\dit/s\b")
    for cell in cells(path, "code"):
        for text in outputs(cell):
            assert not (found := private.search(text)), f"{found[0]!r} in the output of:\n{source(cell)}"


@each_notebook
def test_a_test_in_a_cell_is_called(path: Path) -> None:
    code = "\n".join(map(source, cells(path, "code")))
    for name in re.findall(r"^def (test_\w+)", code, re.M):  # a definition alone tests nothing
        assert re.search(rf"^ *{name}\(", code, re.M), f"nothing calls {name}"


def test_notebooks_are_small() -> None:
    size = {str(p): (ROOT / p).stat().st_size for p in notebooks()}
    assert max(size.values()) < 1_000_000, size
    assert median(size.values()) <= 60_000, size


@each_api
def test_api_notebook_asserts(path: Path) -> None:
    tests = re.compile(r"^\s*(assert\b|test_\w+\(|(torch\.testing\.)?assert_close\()", re.M)
    assert any(tests.search(source(c)) for c in cells(path, "code") if "#| eval: false" not in source(c))


@each_api
def test_api_notebook_has_prose(path: Path) -> None:
    prose, code = len(cells(path, "markdown")), len(cells(path, "code"))
    assert 0.5 <= prose / code <= 1.3, f"{prose} cells of prose, {code} of code"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_stores_its_outputs(path: Path) -> None:
    assert any(c["outputs"] for c in cells(path, "code")), "run it and save it: its outputs are the site's"


# Modules


def test_ruff_is_content() -> None:
    run("ruff", "check", "--no-cache", cwd=ROOT)


def body(function: ast.FunctionDef) -> list[ast.stmt]:
    return function.body[1:] if ast.get_docstring(function) else function.body


def code_lines(function: ast.FunctionDef, lines: list[str]) -> int:
    """The lines of a function's body that are neither docstring, comment nor blank."""
    own = lines[body(function)[0].lineno - 1 : function.end_lineno] if body(function) else []
    return sum(1 for line in own if line.strip() and not line.strip().startswith("#"))


def test_functions_are_short() -> None:
    length = {}
    for path in MODULES:
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length[f"{path.stem}.{node.name}:{node.lineno}"] = code_lines(node, text.splitlines())
    assert {name: n for name, n in length.items() if n > 40} == {}
    assert median(length.values()) <= 9


@each_module
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


# The package


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, unpacked: what `pip install` puts on a machine."""
    tmp = tmp_path_factory.mktemp("wheel")
    run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp, cwd=copy_repository(tmp / "source"))
    [wheel] = tmp.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp / "installed")
    return tmp / "installed"


def test_wheel_holds_the_library_and_nothing_else(installed: Path) -> None:
    assert [p.name for p in installed.iterdir() if p.suffix != ".dist-info"] == ["lor2c"]
    assert {p.name for p in (installed / "lor2c").iterdir()} == {m.name for m in MODULES} | {"_modidx.py", "py.typed"}


def test_wheel_metadata(installed: Path) -> None:
    [metadata] = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    for line in ("Name: lor2c", "License: Apache-2.0", "Provides-Extra: demo"):
        assert f"\n{line}\n" in text
    assert "lor2c = lor2c.cli:main" in metadata.with_name("entry_points.txt").read_text("utf-8")


def test_library_needs_no_notebook_tools(installed: Path) -> None:
    """Every module of the wheel imports where nbdev, fastcore and IPython are not installed."""
    names = ", ".join(f"lor2c.{m.stem}" for m in MODULES if m.stem != "__init__")
    absent = "nbdev", "fastcore", "execnb", "IPython", "ipykernel", "nbformat"
    code = f"import sys; sys.modules |= dict.fromkeys({absent}); import {names}; print(lor2c.__file__)"
    assert run("python", "-c", code, cwd=installed).strip() == str(installed / "lor2c/__init__.py")
