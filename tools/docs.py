"""Build the site into `_docs`: nbdev prepares the notebooks, then Quarto renders them, or smalldocs without Quarto."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import pages  # noqa: F401  nbdev shows notebooks as it says
import yaml
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from packaging.specifiers import SpecifierSet
from smalldocs.config import load
from smalldocs.site import Page, Site

# smalldocs says that it does not read these; this script and nbs/styles.css do their work, or Quarto alone needs them.
DONE_HERE = (
    "output-file is not read", "html-math-method is ignored", "format.html.grid is ignored", "smalldocs compiles no Sass",
    "quarto-required", "respect-user-color-scheme",
)  # fmt: skip
MATHS = re.compile(r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r"<(?:link|script)\b[^>]*\bkatex@[^>]*>(?:</script>)?\s*")
OUTPUT = re.compile(r"<pre>(?=\s*<code>([^<]*)</code>)")
COLUMNS = re.compile(r"\S {2,}\S|^ +\S", re.M)
SEARCH_SIZE = 390_000  # bytes
WEB_FONT = re.compile(r"@import\s+url\(\s*[\"']?https?:[^)]*\)\s*;")


class NbdevSite(Site):
    """A smalldocs site whose pages are named as nbdev names them: `00_lowrank.ipynb` becomes `lowrank.html`."""

    def read(self, src) -> Page:
        page = super().read(src)
        page.out = page.out.with_name(page.front.get("output-file", page.out.name))
        return page

    def write_llms_txt(self) -> None:
        """Nothing: `llms_txt` does, for Quarto too."""


def llms_txt(proc: Path) -> str:
    """`llms.txt` in the sidebar's order and sections, and with what each page says of itself."""
    cfg = get_config()
    lines = [f"# {cfg.title}", "", f"> {cfg.description}"]
    for entry in yaml.safe_load((proc / "_quarto.yml").read_text("utf-8"))["website"]["sidebar"]["contents"]:
        found = list(in_order(entry, proc))
        named = entry if isinstance(entry, dict) else {}
        lines += ["", f"## {named.get('section') or named.get('text') or front(found[0])['title']}", ""]
        for page in found:
            said = front(page)
            copy = page.relative_to(proc).with_name(said["output-file"]).with_suffix(".llms.md").as_posix()
            lines.append(f"- [{said['title']}]({cfg.doc_host}{cfg.doc_baseurl}/{copy}): {said['description']}")
    return "\n".join(lines) + "\n"


def in_order(entry: dict | str | list, proc: Path) -> Iterator[Path]:
    """The pages of an entry of the sidebar: a name, names with a star, or a section of them."""
    if isinstance(entry, dict):
        entry = entry.get("href") or entry["contents"]
    if isinstance(entry, str):
        yield from sorted(proc.glob(entry))
    else:
        for one in entry:
            yield from in_order(one, proc)


def process() -> Path:
    """Let nbdev put `show_doc` for exported code, take hidden cells out and link names; returns its folder."""
    cfg = get_config()
    refresh_quarto_yml()
    index()
    os.chdir(cfg.config_path)
    # By a relative path: nbdev skips files below any folder with a leading dot, also one that the whole checkout is in.
    # And in this process: each worker would import torch first.
    proc = proc_nbs(cfg.nbs_path.relative_to(cfg.config_path), force=True, n_workers=0)
    notebooks = list(proc.rglob("*.ipynb"))
    base = cfg.doc_host + cfg.doc_baseurl
    links = {f"({base}/{html_name(p, proc)}": f"(/{p.relative_to(proc).as_posix()}" for p in notebooks}
    for p in notebooks:  # nbdev's links name the published site; inside the site they are links between its pages
        text = re.sub(rf"\({re.escape(base)}/[^)#\"]*", lambda m: links.get(m[0], m[0]), p.read_text("utf-8"))
        p.write_text(text, "utf-8")
    return proc


def index() -> None:
    """Index the page of every name, for nbdev's links. A name outside `__all__` has no entry there, so no link leads to it."""
    _build_modidx()
    for module, names in import_module("lor2c._modidx").d["syms"].items():
        shown = import_module(module).__all__
        for name in [n for n in names if n.removeprefix(f"{module}.").partition(".")[0] not in shown]:
            del names[name]


def html_name(page: Path, proc: Path) -> str:
    """The name that nbdev gives to a processed notebook's page."""
    return page.relative_to(proc).with_name(front(page)["output-file"]).as_posix()


def front(page: Path) -> dict:
    """What a processed notebook says of itself, in the front matter that nbdev put first: title, description, name."""
    return yaml.safe_load("".join(json.loads(page.read_text("utf-8"))["cells"][0]["source"]).strip().strip("-"))


def root_pages(proc: Path) -> None:
    """Two pages that are no notebooks: the changelog, and the page for an address that isn't there."""
    blob = f"{get_config().git_url}/blob/{get_config().branch}/"
    changes = (get_config().config_path / "CHANGELOG.md").read_text("utf-8").partition("\n")[2]
    changes = re.sub(r"(\]\()(?![a-z]+:|#)", rf"\1{blob}", changes)
    lost = "The page may have moved. Try the search on top of this one, or [begin at the home page](index.ipynb)."
    for name, title, says, text in (
        ("changelog", "What changed", "Each change that you would notice, the newest first.", changes),
        ("404", "There is no such page", "Nothing is at this address.", lost),
    ):
        head = f"---\ntitle: {title}\ndescription: {says}\noutput-file: {name}.html\n---"
        cells = [dict(cell_type=k, id=k, metadata={}, source=s) for k, s in (("raw", head), ("markdown", text))]
        page = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)
        (proc / f"{name}.ipynb").write_text(json.dumps(page), "utf-8")


def sitemap(proc: Path) -> str:
    """`sitemap.xml` in reading order."""
    cfg = get_config()
    home = f"{cfg.doc_host}{cfg.doc_baseurl}/"
    contents = yaml.safe_load((proc / "_quarto.yml").read_text("utf-8"))["website"]["sidebar"]["contents"]
    rows = [f"  <url><loc>{home}{html_name(page, proc)}</loc></url>\n" for page in in_order(contents, proc)]
    start = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n'
    return f"{start}{''.join(rows)}</urlset>\n"


def slim(index: Path) -> None:
    """Cut the texts in the index of the search, as little as needed: a reader fetches it with the first letter typed."""
    entries = json.loads(index.read_text("utf-8"))
    for most in range(2000, 0, -50):
        cut = [{**entry, "text": entry["text"][:most]} for entry in entries]
        if len(text := json.dumps(cut, ensure_ascii=False).encode()) <= SEARCH_SIZE:
            break
    index.write_bytes(text)


def anywhere(page: Path) -> None:
    """Let a page find its style and its links wherever a server shows it: the one for addresses that aren't there."""
    base = f'<base href="{get_config().doc_baseurl}/">'
    page.write_text(page.read_text("utf-8").replace("<head>", f"<head>{base}", 1), "utf-8")


def mathml(match: re.Match) -> str:
    """An equation as MathML, which browsers show without a script."""
    start, kind, tex = match.groups()
    return f"{start}{convert(html.unescape(tex), display='inline' if kind == 'inline' else 'block')}</span>"


def smalldocs(proc: Path) -> Path:
    """Render with smalldocs, then take out what a page would fetch from elsewhere: KaTeX and web fonts."""
    site = NbdevSite(load(proc))
    site.build()
    for page in site.out.rglob("*.html"):
        page.write_text(MATHS.sub(mathml, KATEX.sub("", page.read_text("utf-8"))), "utf-8")
    for css in site.out.rglob("*.css"):
        css.write_text(WEB_FONT.sub("", css.read_text("utf-8")), "utf-8")
    if warnings := [w for w in site.warnings if not any(d in w for d in DONE_HERE)]:
        sys.exit("\n".join(warnings))
    return site.out


def quarto(proc: Path) -> Path:
    """Render with Quarto. Outputs are the notebooks' own: nothing runs."""
    subprocess.run(["quarto", "render", proc, "--no-execute"], check=True)
    built = proc / get_config().doc_path.name
    for page in proc.rglob("*.ipynb"):  # a copy for language models has the notebook's name, with its number
        copy = (built / page.relative_to(proc)).with_suffix(".llms.md")
        copy.rename((built / html_name(page, proc)).with_suffix(".llms.md"))
    return built


def wrap_prose(page: Path) -> None:
    """Let an output's lines wrap if they are prose, such as an error's: those of a table would fall apart."""
    text = page.read_text("utf-8")
    page.write_text(OUTPUT.sub(lambda m: m[0] if COLUMNS.search(m[1]) else '<pre class="prose">', text), "utf-8")


def quarto_fits() -> bool:
    """Whether there is a Quarto, and as new as `quarto-required` in _quarto.yml asks; says so if it is too old."""
    if not shutil.which("quarto"):
        return False
    asked = yaml.safe_load((get_config().nbs_path / "_quarto.yml").read_text("utf-8"))["quarto-required"]
    found = subprocess.run(["quarto", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    fits = SpecifierSet(asked).contains(found, prereleases=True)
    if not fits:
        print(f"Quarto {found} is on the PATH, but the site needs {asked}: smalldocs renders", file=sys.stderr)
    return fits


if __name__ == "__main__":
    render = quarto if quarto_fits() else smalldocs
    with TemporaryDirectory() as folder:  # Quarto skips what is below a folder with a leading dot, too
        proc = Path(shutil.copytree(process(), f"{folder}/site"))
        root_pages(proc)
        built, docs = render(proc), get_config().doc_path
        for page in built.rglob("*.html"):
            wrap_prose(page)
        (built / "llms.txt").write_text(llms_txt(proc), "utf-8")
        (built / "sitemap.xml").write_text(sitemap(proc), "utf-8")
        slim(built / "search.json")
        anywhere(built / "404.html")
        changes = built / "changelog.html"
        changes.write_text(changes.read_text("utf-8").replace("/nbs/changelog.ipynb", "/CHANGELOG.md"), "utf-8")
        shutil.rmtree(docs, ignore_errors=True)
        shutil.move(built, docs)
    print(f"{sum(1 for _ in docs.rglob('*.html'))} pages in {docs}")
