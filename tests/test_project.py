"""The repository keeps its own rules: what is generated is up to date, notebooks are clean, floors and functions hold."""

import ast
import json
import os
import re
import shutil
from collections.abc import Iterator
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path
from statistics import median, quantiles

import pytest
from conftest import MORE, ROOT, copy_repository, notebooks, run
from packaging.requirements import Requirement
from packaging.version import Version

from lor2c.cli.main import COMMANDS
from lor2c.data.tasks import TASKS

PACKAGE = ROOT / "lor2c"
# The package of a floor says nothing by itself.
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "_modidx.py" and p.read_text("utf-8").strip())
API = [p for p in notebooks() if "api" in p.parts]
TUTORIALS = [p for p in notebooks() if p.parent.name == "tutorials"]


def dotted(module: Path) -> str:
    """The name that a module has inside lor2c: `maths.lowrank`."""
    return ".".join(module.relative_to(PACKAGE).with_suffix("").parts)


TREES = {dotted(path): ast.parse(path.read_text("utf-8")) for path in MODULES}
HOUSE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")

each_module = pytest.mark.parametrize("path", MODULES, ids=dotted)
each_notebook = pytest.mark.parametrize("path", notebooks(), ids=str)
each_api = pytest.mark.parametrize("path", API, ids=str)


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
    for module in (repository / "lor2c").rglob("*.py"):
        if not module.name.startswith("__"):  # a module whose notebook is gone must not survive
            module.unlink()
    run("nbdev_export", cwd=repository)
    assert difference(before, snapshot(repository)) == [], "run `make export`; edit notebooks, never lor2c/"


def test_clean_leaves_no_difference(repository: Path) -> None:
    before = snapshot(repository)
    run("nbdev_clean", cwd=repository)
    assert difference(before, snapshot(repository)) == [], "run `make export`"


def test_every_api_notebook_has_its_module() -> None:
    exported = {re.search(r"#\| *default_exp (\S+)", "\n".join(map(source, cells(p, "code"))))[1] for p in API}
    assert exported == {dotted(m) for m in MODULES if not m.stem.startswith("__")}


def test_quarto_config_is_a_relative_link() -> None:
    assert (ROOT / "nbs/_quarto.yml").readlink() == Path("../_quarto.yml")


def test_readme_is_the_index_notebook() -> None:
    run("python", ROOT / "tools/readme.py", "--check", cwd=ROOT)


def test_pictures_of_the_home_page_are_drawn_from_the_records() -> None:
    run("python", ROOT / "tools/pictures.py", "--check", cwd=ROOT)


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


@each_notebook
def test_links_to_files_of_the_repository(path: Path) -> None:
    text = "".join(source(cell) for cell in cells(path, "markdown"))
    named = re.findall(r"lor2c/lor2c/blob/main/([\w./-]+)", text)
    assert [file for file in named if not (ROOT / file).exists()] == []


NO_PROSE = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$\n]*\$|`[^`\n]*`|\]\([^)\n]*\)|^\|.*?$", re.S | re.M)
A_TRAINING = re.compile(r"\b[Aa] training\b(?! (run|step|loop|set|split|row|job|script|loss|batch|data))")


@each_notebook
def test_prose_puts_the_actor_first(path: Path) -> None:
    """No sentence begins with a free relative, and nobody does "a training"."""
    prose = NO_PROSE.sub(" ", "\n\n".join(map(source, cells(path, "markdown"))))
    sentences = re.split(r"(?<=[.!?])\s+|\n\n+", prose)
    assert [s for s in sentences if re.match(r"(What|Who|Whoever|Whatever|Whose)\b[^?]*$", s)] == [], "say who does it"
    assert not A_TRAINING.search(prose), "say a run, or training"


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
    prose, code = len(cells(path, "markdown")), len([c for c in cells(path, "code") if c["id"] != "colab"])
    assert 0.5 <= prose / code <= 1.3, f"{prose} cells of prose, {code} of code"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_stores_its_outputs(path: Path) -> None:
    assert any(c["outputs"] for c in cells(path, "code")), "run it and save it: its outputs are the site's"


# Modules


def test_ruff_is_content() -> None:
    run("ruff", "check", "--no-cache", cwd=ROOT)


def test_type_checker_is_content() -> None:
    run("python", "-m", "mypy", "--cache-dir", os.devnull, cwd=ROOT)


def lengths(*kinds: type[ast.AST]) -> dict[str, int]:
    """The lines of each function or class, its docstring among them."""
    nodes = [(name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kinds)]
    return {f"{name}.{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for name, node in nodes}


def test_functions_are_short() -> None:
    length = lengths(ast.FunctionDef, ast.AsyncFunctionDef)
    assert {name: n for name, n in length.items() if n > 40} == {}
    assert median(length.values()) <= 7
    assert quantiles(length.values(), n=10)[-1] <= 16


def test_classes_are_short() -> None:
    assert {name: n for name, n in lengths(ast.ClassDef).items() if n > 120} == {}


def test_long_files_have_a_reason() -> None:
    """ARCHITECTURE.md says why, for each over 300 lines and for no other."""
    long = [p.relative_to(ROOT).as_posix() for p in MODULES if len(p.read_text("utf-8").splitlines()) > 300]
    assert sorted(re.findall(r"^- `(lor2c/\S+\.py)`: \w", HOUSE, re.M)) == long
    assert len(long) <= 6


def test_the_reference_is_small() -> None:
    names = {name: len(exported(tree)) for name, tree in TREES.items() if not name.endswith("__init__")}
    assert sum(names.values()) <= 150, names


def exported(tree: ast.Module) -> list[str]:
    """The names in a module's `__all__`."""
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"]
    return [name for value in lists for name in ast.literal_eval(value)]


# Public names: functions and classes that a module exports without a leading underscore, and those classes' methods

# `#| exports` is for names that users call, `#| exporti` for those that only other modules import: these are in no
# `__all__` and have no entry in the reference, but docstring, prose and a check as well.
EXPORT = re.compile(r"^#\| *export[is]?\b", re.M)
SILENT = re.compile(r"^#\| *(export[is]?|eval: *false)\b", re.M)
CHECK = re.compile(r"^ *(assert|raise AssertionError)\b|\b(assert_close|gradcheck|raises|refused)\(", re.M)


def public(tree: ast.AST) -> list[ast.FunctionDef | ast.ClassDef]:
    return [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]


@each_module
def test_public_names_have_docstrings(path: Path) -> None:
    """Of three words or more; methods that torch or a Trainer calls, `forward` and `on_...`, have their base's."""
    names = [(n.name, n) for n in public(TREES[dotted(path)])]
    classes = [node for _, node in names if isinstance(node, ast.ClassDef)]
    names += [(f"{c.name}.{n.name}", n) for c in classes for n in public(c) if not re.match("on_|forward$", n.name)]
    assert [name for name, node in names if len((ast.get_docstring(node) or "").split()) < 3] == []


@each_api
def test_public_names_have_prose(path: Path) -> None:
    """A cell that exports public names has prose of its own: some stands between it and the one that exports before it."""
    lacking, prose = [], True
    for cell in json.loads((ROOT / path).read_text("utf-8"))["cells"]:
        prose = prose or cell["cell_type"] == "markdown"
        if cell["cell_type"] == "code" and EXPORT.search(text := source(cell)) and (names := public(ast.parse(text))):
            lacking += [] if prose else [node.name for node in names]
            prose = False
    assert not lacking, f"no prose above the cell that says what these are for: {', '.join(lacking)}"


def known(tree: ast.AST, package: str = "lor2c") -> dict[str, str]:
    """What code, of a module in `package`, imports from lor2c: name here -> full name."""
    found = {"lor2c": "lor2c"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "lor2c"):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            found |= {one.asname or one.name: f"{module}.{one.name}" for one in node.names}
    return found


def used(tree: ast.AST, names: dict[str, str]) -> set[str]:
    """Full names of what code uses of lor2c; a name that it assigns is its own."""
    nodes = list(ast.walk(tree))
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    found = {names[n.id] for n in nodes if isinstance(n, ast.Name) and n.id in names and n.id not in own}
    dotted = [
        n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in names
    ]
    return {HOME.get(one, one) for one in found | {f"{names[n.value.id]}.{n.attr}" for n in dotted}}


HOME = {f"lor2c.{name}": full for name, full in known(TREES["__init__"]).items()}  # of what the package itself exports


def pieces() -> Iterator[tuple[set[str], bool]]:
    """What each running cell, and each function of a test, uses of lor2c, and whether something is checked there.

    What a script of tests/workers finds is checked by the test that starts it.
    """
    modules = {
        path: re.search(r"#\| *default_exp (\S+)", "\n".join(map(source, cells(path, "code"))))[1] for path in API
    }
    for path in notebooks():
        code = [re.sub(r"^[%!].*$", "", source(cell), flags=re.M) for cell in cells(path, "code")]
        own = (
            {n.name: f"lor2c.{modules[path]}.{n.name}" for n in public(TREES[modules[path]])} if path in modules else {}
        )
        names = known(ast.parse("\n".join(code))) | own
        yield from (
            (used(ast.parse(text), names), bool(CHECK.search(text))) for text in code if not SILENT.search(text)
        )
    for path in (ROOT / "tests").rglob("*.py"):
        tree, lines = ast.parse(text := path.read_text("utf-8")), text.splitlines()
        names = known(tree)
        for node in (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)):
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            yield used(node, names), path.parent.name == "workers" or bool(CHECK.search(text))


def test_public_names_are_asserted() -> None:
    """A name that anything outside its module uses, or a cell of its page shows, stands in a cell or test that checks.

    A part of its module that nothing else uses may be checked through such a name, which calls it.
    """
    found = list(pieces())
    asserted = set().union(*(names for names, checks in found if checks))
    imported = [set(known(tree, f"lor2c.{name}".rpartition(".")[0]).values()) for name, tree in TREES.items()]
    outside = set().union(*(names for names, _ in found), *imported)
    lacking = {}
    for module, tree in TREES.items():
        calls: dict[str, set[str]] = {}  # what each function, class and constant of the module mentions
        for node in tree.body:
            own = [node.name] if hasattr(node, "name") else [t.id for t in ast.walk(node) if isinstance(t, ast.Name)]
            calls |= {name: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} for name in own[:1]}
        reached = {name for name in calls if f"lor2c.{module}.{name}" in asserted}
        while more := {name for one in reached for name in calls[one] & calls.keys()} - reached:
            reached |= more
        for name in (n.name for n in public(tree)):
            full = f"lor2c.{module}.{name}".replace(".__init__", "")
            if full not in asserted and (full in outside or name not in reached):
                lacking[full] = "used elsewhere or shown" if full in outside else "called by nothing that is asserted"
    shown = ", ".join(f"{name} ({why})" for name, why in lacking.items())
    assert not lacking, f"no assertion, in a cell of its page or in a test, on what these do: {shown}"


# The house, as ARCHITECTURE.md draws it


def floors() -> dict[str, set[str]]:
    """What each folder may import, itself among it, from the ground up."""
    may: dict[str, set[str]] = {}
    for folder, names in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|", HOUSE, re.M):
        below = {"nothing": set(), "all above": set(may)}  # above in the table
        may[folder] = {folder} | below.get(names.strip(), set(names.strip().split(", ")))
    return may


def arrows(name: str, tree: ast.Module) -> set[str]:
    """The modules of lor2c that a module imports, anywhere in it. `import lor2c` alone, for its version, is none."""
    package = f"lor2c.{name}".rpartition(".")[0]
    full = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)):  # one by one: they may use a name twice
        full |= set(known(node, package).values())
    return {module_of(f) for f in full if f.startswith("lor2c.")}


def module_of(full: str) -> str:
    """The module that holds a name: `maths.lowrank` for `lor2c.maths.lowrank.add_delta`."""
    parts = full.split(".")[1:]
    return next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in TREES), "__init__")


ARROWS = {name: arrows(name, tree) for name, tree in TREES.items()}


def test_every_folder_is_a_floor() -> None:
    assert set(floors()) == {p.parent.name for p in PACKAGE.glob("*/*.py")} == {p.parent.name for p in API}


def test_floors_lead_down() -> None:
    order = list(floors())
    assert {f: may for f, may in floors().items() if may - set(order[: order.index(f) + 1])} == {}


def test_folders_import_what_stands_below_them() -> None:
    may = floors()
    upward = [
        f"{name} imports {target}"
        for name, targets in ARROWS.items()
        if (folder := name.partition(".")[0]) in may
        for target in targets
        if target.partition(".")[0] not in may[folder]
    ]
    assert upward == [], "move the name down, or hand it over as an argument"


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(ARROWS).prepare()  # raises CycleError, which names the circle


def test_maths_knows_neither_peft_nor_transformers() -> None:
    imported = [n for name, tree in TREES.items() if name.startswith("maths.") for n in ast.walk(tree)]
    modules = {a.name for n in imported if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in imported if isinstance(n, ast.ImportFrom) and not n.level}
    assert {m.partition(".")[0] for m in modules} & {"peft", "transformers", "accelerate", "datasets"} == set()


def test_runs_name_no_task() -> None:
    """Neither in code nor in words: a task says of itself how it differs. "alpaca" is also a form of prompts."""
    word = re.compile(rf"\b({'|'.join(TASKS)}|glue)\b", re.I)
    lines = [f"{p.name}: {line}" for p in PACKAGE.glob("runs/*.py") for line in p.read_text("utf-8").splitlines()]
    assert [line for line in lines if word.search(line.replace('template: Template = "alpaca"', ""))] == []


# The tests themselves


@pytest.mark.parametrize("prefix", MORE)
def test_what_make_test_leaves_out_is_there(prefix: str) -> None:
    """A test or notebook that was renamed would slip back into `make test`."""
    file, _, test = prefix.partition("::")
    name, _, case = test.partition("[")
    assert f"def {name}" in (ROOT / file).read_text("utf-8")
    assert "test_notebooks" not in file or Path(f"nbs/{case.removesuffix(']')}.ipynb") in notebooks()


# The package


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel, installed by pip into a folder of its own; what it requires is this environment's."""
    tmp = tmp_path_factory.mktemp("wheel")
    run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp, cwd=copy_repository(tmp / "source"))
    [wheel] = tmp.glob("*.whl")
    run("python", "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp / "installed", wheel, cwd=tmp)
    return tmp / "installed"


def test_wheel_holds_the_library_and_nothing_else(installed: Path) -> None:
    assert sorted(p.name for p in installed.iterdir() if p.suffix != ".dist-info") == ["bin", "lor2c"]
    assert [p.name for p in (installed / "bin").iterdir()] == ["lor2c"]
    files = {p.relative_to(installed / "lor2c") for p in (installed / "lor2c").rglob("*.*") if p.suffix != ".pyc"}
    data = {Path("py.typed"), Path("experiments/papers.toml")}
    assert files == {p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")} | data


def test_wheel_metadata(installed: Path) -> None:
    [metadata] = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    for line in ("Name: lor2c", "License: Apache-2.0", "Provides-Extra: demo"):
        assert f"\n{line}\n" in text
    assert "lor2c = lor2c.cli.main:main" in metadata.with_name("entry_points.txt").read_text("utf-8")
    github, site = "https://github.com/lor2c/lor2c", "https://lor2c.github.io/lor2c"
    urls = dict(re.findall("^Project-URL: (.+), (.+)", text, re.M))
    assert urls == {
        "Documentation": site, "Source": github, "Issues": f"{github}/issues", "Changelog": f"{github}/blob/main/CHANGELOG.md",
    }  # fmt: skip


def test_readme_reads_well_on_a_package_index(installed: Path) -> None:
    """Its links and pictures lead to pages and files that are there, by their whole address."""
    [metadata] = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8").partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)", text)
    assert len(links) > 30 and [link for link in links if not re.match("https://", link)] == []
    of_site = [link.removeprefix("https://lor2c.github.io/lor2c/") for link in links if "lor2c.github.io" in link]
    pages = {re.sub(r"/\d+_", "/", p.relative_to("nbs").with_suffix(".html").as_posix()) for p in notebooks()}
    assert [link for link in of_site if link not in pages and not (ROOT / "nbs" / link).is_file()] == []
    assert {"images/structure.svg", "images/gemma_loss.svg"} <= set(of_site) and "[!" not in text


READ = """
import argparse, os, pydoc, sys
sys.modules |= dict.fromkeys(ABSENT)
import MODULES
print(lor2c.__file__, pydoc.render_doc(lor2c.LoR2CConfig, renderer=pydoc.plaintext), sep="\\f", end="\\f")
os.environ["COLUMNS"] = "80"
parser = lor2c.cli.main.make_parser()
[commands] = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
print(parser.format_help(), *(c.format_help() for c in commands.values()), sep="\\n", end="\\f")
print(*(f"{name}: {a.option_strings}" for name, c in commands.items() for a in c._actions if len(a.help.split("(")[0]) < 4))
"""


@pytest.fixture(scope="module")
def read(installed: Path) -> list[str]:
    """What a user of the wheel reads, where nbdev, fastcore and IPython are not installed: where it is, two helps, gaps."""
    names = ", ".join(f"lor2c.{dotted(m)}" for m in MODULES if not m.stem.startswith("__"))
    absent = "nbdev", "fastcore", "execnb", "IPython", "ipykernel", "nbformat"
    code = READ.replace("ABSENT", repr(absent)).replace("MODULES", names)
    return run("python", "-c", code, cwd=installed).split("\f")


def test_library_needs_no_notebook_tools(installed: Path, read: list[str]) -> None:
    assert read[0] == str(installed / "lor2c/__init__.py")


TAKEN = """
import sys, nbformat, nbclient
nb = nbformat.read("demo.ipynb", as_version=4)
left_out = "eval: false", "losses[-1] < losses[0]"  # one epoch has no second loss; the page's own test has six
nb.cells = [cell for cell in nb.cells if not any(part in cell.source for part in left_out)]
for cell in nb.cells:
    cell.source = cell.source.replace("num_train_epochs=6", "num_train_epochs=1")
nb.cells.append(nbformat.v4.new_code_cell("import lor2c; print(lor2c.__file__)"))
nbclient.NotebookClient(nb, timeout=None, kernel_name="python3").execute()
print(*(out.text for cell in nb.cells if cell.cell_type == "code" for out in cell.outputs if out.get("name") == "stdout"))
"""


def test_a_tutorial_is_taken_along(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook alone in a folder, with the wheel: no file of the repository is in sight."""
    shutil.copy(ROOT / "nbs/tutorials/demo.ipynb", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(installed))
    told = run("python", "-c", TAKEN, cwd=tmp_path)
    assert told.strip().endswith(str(installed / "lor2c/__init__.py"))
    assert "accuracy on 100 other snippets: " in told and told.count("without the repository") == 1


def test_help_tells_what_a_user_needs(read: list[str]) -> None:
    """Shapes, errors, source, and what each argument means."""
    parts = "A (r, d), B (d, r)", "Raises:", "TypeError:", "ValueError:", "Source: LoR2C", "r = 8: rank of every residual"
    assert [part for part in parts if part not in read[1]] == []


def test_help_of_the_command_line(read: list[str]) -> None:
    """Every flag says what it is, in lines that fit a terminal of 80 columns and break no name at a hyphen."""
    assert read[2].count("usage: lor2c ") == 1 + len(COMMANDS)
    assert [line for line in read[2].splitlines() if len(line) > 80 or re.search(r"\w-$", line)] == []
    assert read[3].strip() == ""


def test_stated_versions_are_those_of_the_pins_and_ranges():
    """The first row of the page's table is what constraints.txt pins, the second the lower bounds of settings.ini."""
    page = (ROOT / "nbs/api/tuners/00_compat.ipynb").read_text()
    names = ("torch", "transformers", "peft", "accelerate")
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", page)
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    ranges = re.search(r"^requirements = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1].split()
    bounds = {r.name: r.specifier for r in map(Requirement, ranges)}
    assert len(rows) == 2 and rows[0] == tuple(pins[name] for name in names)
    lowest = {name: next(s.version for s in bounds[name] if s.operator == ">=") for name in names}
    assert [Version(v) for v in rows[1]] == [Version(lowest[name]) for name in names]
    assert all(pins[name] in bounds[name] for name in names) and "5.24.0" not in bounds["transformers"]
