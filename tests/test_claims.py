"""What the site says in numbers is what its cells print, and what the records under results/ hold."""

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ROOT, notebooks

from lor2c.experiments.papers import experiments

PAGES = [p for p in notebooks() if "api" not in p.parts]
# Code, equations, links and tags are no prose.
NO_PROSE = re.compile(r"```.*?```|`[^`]*`|\]\([^)]*\)|\$\$.*?\$\$|\$[^$]*\$|<[^>]*>", re.S)
NUMBER = re.compile(r"(?<![\w.,^])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
# Versions, sections and years are no figures.
NO_FIGURE = re.compile(
    r"(?i)\b(?:python|transformers|trl|apache|peft|torch|cc by-nc|sections?)[- ]\d+(?:\.\d+)+|\b(?:19|20)\d\d\b"
)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def cells(page: Path, kind: str) -> list[dict]:
    return [c for c in json.loads((ROOT / page).read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def printed(cell: dict) -> Iterator[str]:
    """The text that a cell put out."""
    for out in cell["outputs"]:
        yield "".join(out.get("text", ""))
        yield from ("".join(value) for kind, value in out.get("data", {}).items() if kind.startswith("text/"))


def numbers(text: str) -> Iterator[str]:
    yield from (match[0].replace(",", "") for match in NUMBER.finditer(text.replace("_", "")))


def exact(number: str) -> bool:
    """Whether a number has a decimal point or four digits: a figure, rather than a layer, a rank or an epoch."""
    return "." in number or len(number.lstrip("-")) >= 4


def rounds_to(found: str, claimed: str) -> bool:
    decimals = len(claimed.partition(".")[2])
    return abs(abs(float(found)) - abs(float(claimed))) <= 0.5000001 * 10**-decimals


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.with_suffix("").relative_to("nbs").as_posix())
def test_a_number_in_prose_stands_in_a_cell(page: Path) -> None:
    code = cells(page, "code")
    known = {n for cell in code for text in (source(cell), *printed(cell)) for n in numbers(text)}
    unfounded = []
    for cell in cells(page, "markdown"):
        prose = NO_FIGURE.sub(" ", NO_PROSE.sub(" ", source(cell)))
        unfounded += [n for n in numbers(prose) if exact(n) and not any(rounds_to(k, n) for k in known)]
    assert unfounded == [], "let a cell print it, or take it out"


# The tables of the comparison, computed again from the files


def recorded(experiment: str) -> list[dict]:
    """The records of a file under results/, a line each."""
    text = (ROOT / "results" / f"{experiment}.jsonl").read_text("utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text[:-1].split("\n")]


def compared(experiment: str) -> dict[tuple[str, str], list[float]]:
    """(contender, task) -> the best scores of an experiment's records, which are named TASK-CONTENDER-SEED."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in recorded(experiment):
        task, contender = record["name"].rpartition("-")[0].split("-", 1)
        metrics = record["metrics"]
        found.setdefault((contender, task), []).append(metrics["best"][metrics["chosen_by"]])
    return found


def shown(page: Path) -> list[list[list[str]]]:
    """The tables that cells of a page put out, as rows of cells."""
    texts = [text for cell in cells(page, "code") for text in printed(cell) if text.startswith("|")]
    return [[[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()] for text in texts]


@pytest.mark.parametrize(("experiment", "place"), [("whole", 0), ("thousand", 1)])
def test_the_comparison_shows_means_of_the_records(experiment: str, place: int) -> None:
    records = compared(experiment)
    assert {len(scores) for scores in records.values()} == {3}
    table = shown(Path("nbs/results/comparison.ipynb"))[place]
    tasks = [head.split()[0] for head in table[0][3:]]
    wanted = {(c, t): f"{mean(scores):.4f} ± {stdev(scores):.4f}" for (c, t), scores in records.items()}
    plain = {"lora-rank-8": "lora", "lor2c-rm-false": "lor2c", "imlor2c-rm-false": "imlor2c"}
    found = {}
    for name, _, _, *scores in table[2:-1]:  # the last row is the constant answer
        label = re.sub(r"[ =]", "-", name).lower()
        found |= {(plain.get(label, label), task): score for task, score in zip(tasks, scores, strict=True)}
    assert found == wanted


@pytest.mark.parametrize("experiment", ["whole", "thousand"])
def test_the_papers_tables_show_means_of_the_records(experiment: str) -> None:
    names = {
        "LoRA": "lora",
        "LoR2C": "lor2c",
        "IMLoR2C": "imlor2c",
        "ResLoRA bs": "reslora-bs",
        "RM-LoRA R=8": "rmlora",
    }
    records, checked = compared(experiment), set()
    for head, _, *rows in shown(Path("nbs/results/tables.ipynb")):
        for name, *numbers in rows:
            method, _, kind = name.partition(", MiniLM, ")
            for task, number in zip(head[1:], numbers, strict=True) if kind == experiment and method in names else ():
                of_one = names[method], task.replace("-", "").lower()
                scores = [100 * score for score in records.get(of_one, ())]
                assert number == (f"{mean(scores):.1f} ± {stdev(scores):.1f}" if scores else number), (name, task)
                assert scores or number in ("", "—"), (name, task)
                checked |= {of_one} if scores else set()
    assert checked == {(name, task) for name, task in records if name in names.values()}  # none is left out


def test_the_papers_figures_are_the_same_in_both_places() -> None:
    """Those of tables.ipynb are those that `lor2c paper` prints; RM-LoRA's are shares there, and of its pairs the first."""
    order = ["lor2c-table1", "lor2c-table2", "reslora-table1", "reslora-table2", "rm-lora-table1"]
    other = {"Full FT": "Full FT", "AdaLoRA R=8": "AdaLoRA, 1.92M", "w/o FT": "w/o FT"}
    for name, (head, _, *rows) in zip(order, shown(Path("nbs/results/tables.ipynb")), strict=True):
        one, checked = experiments()[name], 0
        for label, *numbers in (row for row in rows if row[0].endswith("**, paper")):
            label = label.removeprefix("**").removesuffix("**, paper")
            figures = one.rows[other.get(label, label)].paper.split()
            figures = [f"{100 * float(f):.1f}" for f in figures] if name == "rm-lora-table1" else figures
            assert numbers[head[1:].index("#Params") + 1 if "#Params" in head else 0 :] == figures, (name, label)
            checked += 1
        assert checked > 5


# The records: what results/README.md says of them

EXPERIMENTS = sorted(path.stem for path in (ROOT / "results").glob("*.jsonl"))
SECTIONS = dict(re.findall(r"^## (\S+)\.jsonl$(.*?)(?=^## |\Z)", (ROOT / "results/README.md").read_text(), re.M | re.S))


def test_results_hold_experiments_and_their_description() -> None:
    assert {path.name for path in (ROOT / "results").iterdir()} == {"README.md", *(f"{e}.jsonl" for e in EXPERIMENTS)}
    assert sorted(SECTIONS) == EXPERIMENTS


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_records_have_names(experiment: str) -> None:
    """Each its own, and a method, a task and a seed that a name tells are those of the record."""
    records = recorded(experiment)
    names = [record["name"] for record in records]
    assert len(set(names)) == len(names) and all(next(iter(record)) == "name" for record in records)
    for record in records if "Names: TASK-CONTENDER-SEED" in SECTIONS[experiment] else ():
        assert record["name"].startswith(f"{record['task']}-{record['method']}-")
        assert record["name"].endswith(f"-{record['seed']}")


@cache
def code_of_pages() -> dict[Path, str]:
    return {page: "\n".join(map(source, cells(page, "code"))) for page in PAGES}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_description_names_the_command_and_the_pages(experiment: str) -> None:
    """Every page that reads an experiment, and no other."""
    section = SECTIONS[experiment]
    assert "?" in section and re.search(r"```sh\n(lor2c |python benchmarks/|for )", section)
    reads = re.compile(rf"results/{experiment}\.jsonl|(read|load|show|by_rate|records)\(\"{experiment}\"")
    readers = {page.relative_to("nbs").as_posix() for page, text in code_of_pages().items() if reads.search(text)}
    assert readers == set(re.findall(r"`(\S+\.ipynb)`", section)) and readers


def test_a_record_is_kept_in_the_place_of_its_name(tmp_path: Path) -> None:
    """What the scripts under benchmarks/ write: a name's record again, or a new one at the end."""
    spec = importlib.util.spec_from_file_location("records", ROOT / "benchmarks/records.py")
    records = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(records)
    file = tmp_path / "results" / "some.jsonl"
    for name, loss in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        records.keep(file, name, {"loss": loss})
    assert file.read_text() == '{"name": "a", "loss": 3.0}\n{"name": "b", "loss": 2.0}\n'
    run = tmp_path / "runs/rte/lora-rank-4/seed-1"
    run.mkdir(parents=True)
    (run / "record.json").write_text('{"loss": 4.0}')
    records.gather(tmp_path / "runs", file)
    assert file.read_text().splitlines()[2:] == ['{"name": "rte-lora-rank-4-1", "loss": 4.0}']
