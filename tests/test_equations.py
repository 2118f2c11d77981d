"""The map of equations: each has what computes it and what checks it, the page says so, and the checks see zeros."""

import ast
import importlib
import re
import sys

import nbformat
import pytest
from conftest import ROOT, run
from latex2mathml.converter import convert

sys.path.insert(0, str(ROOT / "tools"))
import equations  # noqa: E402

EQUATIONS = list(equations.equations().values())
PAGE = ROOT / "nbs/explanations/equations.ipynb"
PAPERS = {"LoR2C": "lor2c.txt", "ResLoRA": "reslora.txt", "RM-LoRA": "rm_lora.txt"}
each = pytest.mark.parametrize("e", EQUATIONS, ids=lambda e: " ".join(e.key))


@each
def test_every_equation_has_a_symbol_and_a_check(e):
    assert e.symbols, "name it in the docstring of what computes it: `Source: PAPER Eq. N.`"
    assert e.checks, "write `# checks: PAPER Eq. N` into a cell or a test that fails without it"
    assert bool(e.why) == (not e.symbols[0].path) and (len(e.symbols) == 1 or not e.why), "ours, or another library's"


def test_marks_name_equations_that_exist():
    for place, keys, loose in equations.symbols() + equations.checks():
        assert loose == [], f"{place.name}: write `PAPER Eq. 1, 2` or `PAPER Algorithm 1`"
        assert keys and set(keys) <= equations.equations().keys(), f"{place.name} names {keys}"


def test_nothing_is_lost_in_reading_marks():
    """In the tests' files: a comment outside of a test would check nothing."""
    written = sum(len(equations.CHECKS.findall(p.read_text("utf-8"))) for p in ROOT.glob("tests/**/*.py"))
    assert written == sum(place.path.endswith(".py") for place, _, _ in equations.checks())


def test_numbers_have_no_gaps():
    for paper, last in {"LoR2C": 12, "ResLoRA": 16, "RM-LoRA": 10}.items():
        numbers = [number for p, number in equations.equations() if p == paper]
        assert numbers[:last] == [f"Eq. {n}" for n in range(1, last + 1)]
        assert numbers[last:] == (["Algorithm 1"] if paper == "RM-LoRA" else [])


@pytest.mark.parametrize("paper", PAPERS)
def test_numbers_are_the_papers(paper):
    texts = [p / "shared/papers" / PAPERS[paper] for p in ROOT.parents]
    text = next((p.read_text("utf-8") for p in texts if p.is_file()), None)
    if text is None:
        pytest.skip("needs the text of the paper")
    numbered = re.findall(r"(?:\\tag ?\{(\d+)\}|\((\d+)\)) *\${0,2} *$", text, re.M)
    found = {f"Eq. {a or b}" for a, b in numbered} | {f"Algorithm {n}" for n in re.findall(r"\bAlgorithm (\d+)", text)}
    assert found == {number for p, number in equations.equations() if p == paper}


def test_symbols_exist():
    for place in {place.name: place for e in EQUATIONS for place in e.symbols}.values():
        module, name = place.name.rpartition(".")[::2]
        assert callable(getattr(importlib.import_module(module), name)), place.name


def test_checks_run_and_assert():
    for place in {place.name: place for e in EQUATIONS for place in e.checks}.values():
        if place.path.endswith(".py"):
            tree = ast.parse((ROOT / place.path).read_text("utf-8"))
            source = next(ast.unparse(f) for f in tree.body if getattr(f, "name", "") == place.name.rpartition("::")[2])
            assert "mark.slow" not in source, f"{place.name} is too slow to run often"
        else:
            source = nbformat.read(ROOT / place.path, as_version=4).cells[place.cell].source
            assert not equations.SKIPPED.search(source) and place.section, place.name
        assert "assert" in source, place.name


@each
def test_formulas_become_mathml(e):
    assert "\\" not in convert(e.tex, display="block")


def test_the_page_is_up_to_date():
    outputs = [out for c in nbformat.read(PAGE, as_version=4).cells for out in c.get("outputs", [])]
    stored = [out["data"]["text/markdown"] for out in outputs if "text/markdown" in out.get("data", {})]
    assert stored == [equations.page(paper) for paper in PAPERS], f"run {PAGE.relative_to(ROOT)} and save it"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # minutes on an idle core
def test_checks_see_zeros():
    print(run("python", ROOT / "tools/equations.py", "--zero", cwd=ROOT))
