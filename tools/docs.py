"""Build the site into `_docs`: nbdev prepares the notebooks, then Quarto renders them, or smalldocs without Quarto."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from inspect import Parameter, Signature, formatannotation
from pathlib import Path

from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer
from smalldocs.config import load
from smalldocs.site import Page, Site

# smalldocs says that it does not read these two; this script does their work.
DONE_HERE = ("output-file is not read", "html-math-method is ignored")
MATHS = re.compile(r'(<span class="math (inline|display)">)\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r"<(?:link|script)\b[^>]*\bkatex@[^>]*>(?:</script>)?\s*")
WEB_FONT = re.compile(r"@import\s+url\(\s*[\"']?https?:[^)]*\)\s*;")


class Renderer(BasicMarkdownRenderer):
    """nbdev's `show_doc`, but a dataclass shows its own fields and their help. On PEFT's configs nbdev's own fails."""

    def __init__(self, sym: object, **kwargs) -> None:
        if is_dataclass(sym) and (found := NbdevLookup()[sym.__name__]):  # only a module's class has its comments
            sym = getattr(import_module(found[1].removesuffix(".py").replace("/", ".")), sym.__name__)
        own = [f for f in fields(sym) if f.name in sym.__annotations__] if is_dataclass(sym) else []
        if own:  # the inherited annotations are strings that mean something in PEFT's modules only
            sym.__signature__ = Signature([parameter(f) for f in own])
        super().__init__(sym, **kwargs)
        self.fn = self.nm  # nbdev finds a source line by the bare name only
        for f in own:
            self.dm.dm[f.name].docment = f.metadata.get("help") or self.dm.dm[f.name].docment


def parameter(f: Field) -> Parameter:
    """A dataclass's field as a parameter of its signature."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    default = Parameter.empty if default is MISSING else default
    return Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=formatannotation(f.type))


get_config()["renderer"] = "docs.Renderer"  # at import: each of nbdev's workers imports this script


class NbdevSite(Site):
    """A smalldocs site whose pages are named as nbdev names them: `api/00_lowrank.ipynb` becomes `api/lowrank.html`."""

    def read(self, src) -> Page:
        page = super().read(src)
        page.out = page.out.with_name(page.front.get("output-file", page.out.name))
        return page


def process() -> Path:
    """Let nbdev put `show_doc` for exported code, take hidden cells out and link names; returns its folder."""
    refresh_quarto_yml()
    _build_modidx()
    proc = proc_nbs(force=True)
    pages = list(proc.rglob("*.ipynb"))
    base = get_config().doc_host + get_config().doc_baseurl
    links = {f"({base}/{name}": f"(/{p.relative_to(proc).as_posix()}" for p in pages if (name := html_name(p, proc))}
    for p in pages:  # nbdev's links name the published site; inside the site they are links between its pages
        text = re.sub(rf"\({re.escape(base)}/[^)#\"]*", lambda m: links.get(m[0], m[0]), p.read_text("utf-8"))
        p.write_text(text, "utf-8")
    return proc


def html_name(page: Path, proc: Path) -> str:
    """The name that nbdev gives to a processed notebook's page, from the front matter that nbdev put first."""
    front = "".join(json.loads(page.read_text("utf-8"))["cells"][0]["source"])
    name = re.search(r"^output-file: (\S+)$", front, re.M)
    return page.relative_to(proc).with_name(name[1]).as_posix() if name else ""


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
    return proc / get_config().doc_path.name


if __name__ == "__main__":
    built = (quarto if shutil.which("quarto") else smalldocs)(process())
    docs = get_config().doc_path
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(built, docs)
    print(f"{sum(1 for _ in docs.rglob('*.html'))} pages in {docs}")
