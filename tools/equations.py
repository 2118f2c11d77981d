"""The map of equations: what computes each numbered equation of the papers, and what checks that.

The equations are in equations.toml. Two kinds of marks say the rest:
- an equation after `Source:` in an exported docstring, `Source: LoR2C Eq. 5.`: whatever has it computes that equation;
- a comment on a line of its own, in a notebook's cell or in a pytest function: `# checks: LoR2C Eq. 2, 9; ResLoRA Eq. 1`.

`python tools/equations.py` lists the map. With `--zero` it runs every check as it is, and again with each function marked
for its equation returning zeros, and fails where a check fails without that, or none fails with it.
"""

import argparse
import ast
import functools
import importlib
import inspect
import multiprocessing
import os
import re
import sys
import tomllib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/lor2c/lor2c/blob/main"
NAMED = re.compile(r"\b(LoR2C|ResLoRA|RM-LoRA) (Eq\.|Algorithm) (\d+(?:, \d+)*)")
LOOSE = re.compile(r"\bEqs?\. ?\d|\bAlgorithm \d")  # a citation that is no mark
CHECKS = re.compile(r"^ *# checks: (.+)$", re.M)
SKIPPED = re.compile(r"^\s*#\s*\|\s*(eval:\s*false|slow\b)", re.M)

NOT_REACHED = "what was to be checked was not reached"

Key = tuple[str, str]  # paper and number, such as ("LoR2C", "Eq. 5")


@dataclass(frozen=True)
class Place:
    "A symbol, `lor2c.maths.sfs.sfs` or another library's; a cell, `nbs/api/maths/02_sfs.ipynb[8]`; a test, `tests/x.py::y`."

    name: str
    path: str = ""  # relative to the repository; none for another library's symbol
    cell: int = -1  # of a notebook
    section: str = ""  # the heading above


@dataclass(frozen=True)
class Equation:
    "An equation or an algorithm with what computes it and what checks that."

    key: Key
    what: str
    tex: str
    note: str
    why: str  # it is not ours, where it is not
    symbols: list[Place]
    checks: list[Place]


# Marks


def keys_in(text: str) -> list[Key]:
    "The equations that a text names."
    return [(paper, f"{kind} {n}") for paper, kind, ns in NAMED.findall(text) for n in ns.split(", ")]


def loose(text: str) -> list[str]:
    "Citations that a mark should have been."
    return LOOSE.findall(NAMED.sub("", text))


def cells(path: Path) -> Iterator[tuple[int, str, str]]:
    "Every code cell of a notebook: its index, its source, the heading above it; headings of callouts do not count."
    section = ""
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            yield i, cell.source, section
        else:
            outside = re.sub(r"^:::+ *\{.*?^:::+ *$", "", cell.source, flags=re.M | re.S)
            section = ([section] + re.findall(r"^##+ +(.+?) *$", outside, re.M))[-1]


def notebooks() -> list[Path]:
    return sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if not {"_proc", ".ipynb_checkpoints"} & set(p.parts))


def sources(source: str) -> Iterator[tuple[str, str]]:
    "Functions and classes of an exported cell, with the source that their docstrings name."
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, (ast.get_docstring(node) or "").partition("Source:")[2]


def symbols() -> list[tuple[Place, list[Key], list[str]]]:
    "Every exported symbol with an equation for its source: where it is, its marks, and citations that are none."
    found = []
    for path in notebooks():
        module = None
        for i, source, section in cells(path):
            if match := re.search(r"^#\| *default_exp (\S+)", source, re.M):
                module = match[1]
            if re.search(r"^#\| *export[si]?\b", source, re.M):
                for name, text in sources(source):
                    if LOOSE.search(text):
                        place = Place(f"lor2c.{module}.{name}", path.relative_to(ROOT).as_posix(), i, section)
                        found.append((place, keys_in(text), loose(text)))
    return found


def checks() -> list[tuple[Place, list[Key], list[str]]]:
    "Every cell and every test with a comment that says what it checks."
    found = []
    for path in notebooks():
        name = path.relative_to(ROOT).as_posix()
        for i, source, section in cells(path):
            for said in CHECKS.findall(source):
                found.append((Place(f"{name}[{i}]", name, i, section), keys_in(said), loose(said)))
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for said in CHECKS.findall("\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])):
                    found.append((Place(f"{name}::{node.name}", name), keys_in(said), loose(said)))
    return found


@functools.cache
def equations() -> dict[Key, Equation]:
    "The map."
    ours, seen, found = symbols(), checks(), {}
    for paper, listed in tomllib.loads((ROOT / "tools/equations.toml").read_text("utf-8")).items():
        for e in listed:
            key = paper, e["number"]
            theirs = [Place(e["theirs"])] if "theirs" in e else []
            places = [[place for place, keys, _ in some if key in keys] for some in (ours, seen)]
            found[key] = Equation(
                key, e["what"], e["tex"], e.get("note", ""), e.get("why", ""), theirs + places[0], places[1]
            )
    return found


# The page


def anchor(heading: str) -> str:
    "The identifier that Pandoc gives to a heading."
    text = re.sub(r"[^\w\s.-]", "", heading.lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip()))


def link(place: Place, here: str) -> str:
    "A link from a page to a section of a notebook, or to a test's file."
    if place.path.endswith(".py"):
        return f"[`{place.name.removeprefix('tests/')}`]({REPOSITORY}/{place.path})"
    title = re.sub(r"^\d+_", "", Path(place.path).stem)
    if place.path == here:
        return f"[{place.section}](#{anchor(place.section)})"
    to = os.path.relpath(place.path, Path(here).parent)
    return f"[{title}: {place.section}]({to}#{anchor(place.section)})"


def block(e: Equation, here: str) -> str:
    "An equation as the page shows it."
    where: dict[str, list[str]] = {}
    for place in e.symbols:
        where.setdefault(link(place, here) if place.path else "", []).append(f"`{place.name}`")
    by = "; ".join(
        f"{', '.join(names)} in {to}" if to else f"Not ours, {e.why}: {names[0]}" for to, names in where.items()
    )
    seen = list(dict.fromkeys(link(place, here) for place in e.checks))
    seen = "there" if seen == list(where) else f"in {'; '.join(seen)}"
    parts = [
        f"#### {' '.join(e.key)}",
        f"{e.what}.",
        f"$$ {' '.join(e.tex.split())} $$",
        e.note,
        f"{by}. Checked {seen}.",
    ]
    return "\n\n".join(part for part in parts if part)


def page(paper: str, here: str = "nbs/explanations/equations.ipynb") -> str:
    "All equations of a paper, one block each, as Markdown."
    return "\n\n".join(block(e, here) for key, e in equations().items() if key[0] == paper)


# Zeros


def zeros(value: Any) -> Any:
    "Zeros like a value, in its shape and type; what is no number stays, and a module computes zeros from now on."
    import torch

    if isinstance(value, torch.nn.Module):
        value.forward = returning_zeros(value.forward)
        return value
    if isinstance(value, torch.Tensor):  # a parameter is no result; times 0, so that a graph stays
        kept, numbers = isinstance(value, torch.nn.Parameter), value.is_floating_point()
        return value if kept else value * 0 if numbers else torch.zeros_like(value)
    if isinstance(value, bool | int | float):
        return type(value)(0)
    if isinstance(value, list | tuple):
        of = [zeros(part) for part in value]
        return type(value)(*of) if hasattr(value, "_fields") else type(value)(of)
    if isinstance(value, dict):
        return {name: zeros(part) for name, part in value.items()}
    return map(zeros, value) if inspect.isgenerator(value) else value


def returning_zeros(function: Any) -> Any:
    "The same with a result of zeros. What returns nothing does nothing; of a class of modules `forward` is meant."
    if isinstance(function, type):
        function.forward = returning_zeros(function.forward)
        return function

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        nothing = getattr(function, "__annotations__", {}).get("return", 0) is None
        return None if nothing else zeros(function(*args, **kwargs))

    return changed


def zero(name: str) -> None:
    "Let a symbol return zeros, under whatever name a loaded module has it."
    module, attribute = name.rpartition(".")[::2]
    original = getattr(importlib.import_module(module), attribute)
    changed = returning_zeros(original)
    for holder in [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]:
        for key in [key for key, value in vars(holder).items() if value is original]:
            setattr(holder, key, changed)


def error_in_cell(check: Place, symbol: Place | None) -> str:
    "The error of a notebook's cell after all cells above it, or nothing; a page that defines the symbol has it changed too."
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    os.chdir(ROOT / Path(check.path).parent)
    for i, source, _ in cells(ROOT / check.path):
        try:
            if i <= check.cell and not SKIPPED.search(source):
                exec(compile(source, f"{check.path}[{i}]", "exec"), vars(main))
        except Exception as error:  # above the check: it may still be reached
            if i == check.cell:  # a name that an earlier cell did not get to is no finding
                return NOT_REACHED if isinstance(error, NameError) else type(error).__name__
        if symbol and (symbol.path, symbol.cell) == (check.path, i):
            name = symbol.name.rpartition(".")[2]
            setattr(main, name, returning_zeros(getattr(main, name)))
    return ""


class Recorder:
    "A plugin of pytest that keeps the first failure of a test itself."

    said = ""

    def pytest_exception_interact(self, call: Any) -> None:
        if call.when == "call":
            self.said = self.said or type(call.excinfo.value).__name__


def error_in_test(check: Place) -> str:
    "The error of a pytest function, or nothing."
    import pytest

    recorder = Recorder()
    os.chdir(ROOT)
    arguments = ["-x", "-q", "-p", "no:cacheprovider", check.name]
    code = pytest.main(arguments, plugins=[recorder])
    return recorder.said or (NOT_REACHED if code else "")


def outcome(check: Place, symbol: Place | None) -> str:
    "The error that a check ends in where a symbol returns zeros, or none does; in a process of its own."
    sys.stdout = sys.stderr = open(os.devnull, "w")
    if symbol:
        zero(symbol.name)
    return error_in_test(check) if check.path.endswith(".py") else error_in_cell(check, symbol)


def try_zeros() -> Iterator[str]:
    "Every check as it is and with zeros, as it goes; raises SystemExit with what is wrong at the end."
    import lor2c.tuners.fold  # noqa: F401  here, so that no process has to

    edges = [(e, check, symbol) for e in equations().values() for check in e.checks for symbol in e.symbols]
    alone = list(dict.fromkeys(check for _, check, _ in edges))
    pairs = list(dict.fromkeys((check, symbol) for _, check, symbol in edges))
    tasks = [(check, None) for check in alone] + pairs
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        errors = {}
        for task, waiting in [(task, pool.apply_async(outcome, task)) for task in tasks]:
            errors[task] = waiting.get()
            yield f"{task[0].name} with {task[1].name if task[1] else 'nothing'} zero: {errors[task] or 'passes'}"
    wrong = [f"{check.name} fails as it is: {errors[check, None]}" for check in alone if errors[check, None]]
    for e in equations().values():
        fail = {(c, s) for c in e.checks for s in e.symbols if errors[c, s] not in ("", NOT_REACHED)}
        wrong += [
            f"{' '.join(e.key)}: no check fails where {s.name} is zero"
            for s in e.symbols
            if s not in {s for _, s in fail}
        ]
        wrong += [f"{' '.join(e.key)}: {c.name} never fails" for c in e.checks if c not in {c for c, _ in fail}]
    if wrong:
        raise SystemExit("\n".join(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero", action="store_true", help="run the checks, with each marked function returning zeros")
    if parser.parse_args().zero:
        for line in try_zeros():
            print(line, flush=True)
        return
    for e in equations().values():
        names = [", ".join(place.name for place in places) or "NOTHING" for places in (e.symbols, e.checks)]
        print(f"{' '.join(e.key):22} {names[0]}  <-  {names[1]}")


if __name__ == "__main__":
    main()
