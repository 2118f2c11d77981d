"""Build the site into `_docs`: nbdev prepares the notebooks, then Quarto renders them, or smalldocs without Quarto."""

import ast
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from inspect import Parameter, Signature, formatannotation
from itertools import pairwise
from pathlib import Path

import nbdev.serve
from execnb.nbio import NbCell, mk_cell
from latex2mathml.converter import convert
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup, _build_modidx
from nbdev.processors import FilterDefaults, rm_export
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from nbdev.showdoc import BasicMarkdownRenderer
from smalldocs.config import load
from smalldocs.layout import SiteNav
from smalldocs.site import Page, Site

# smalldocs says that it does not read these three; this script does the work of two, nbs/styles.css that of the third.
DONE_HERE = ("output-file is not read", "html-math-method is ignored", "format.html.grid is ignored")
SEEN_AT_ONCE = 40  # lines of code that fit a laptop's screen: longer sources are folded
COLAB = """::: {{.colab}}
[Open in Colab](https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/{path})

<details><summary>What to run there first</summary>

```python
!git clone -q {git_url} && pip install -q "./{repo}[demo]"
%cd {repo}/{folder}
```

</details>
:::"""
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
        self.docs = sections(self.docs or "")


def sections(docstring: str) -> str:
    """A docstring with its `Args:` and `Raises:` as lists and its examples as code. Markdown would run their lines together."""
    blocks = docstring.split("\n\n")
    for i, block in enumerate(blocks):
        head, _, body = block.partition("\n")
        if head in ("Args:", "Returns:", "Raises:"):
            items = re.sub(r"\n {8,}", " ", body)  # an item's further lines are deeper
            blocks[i] = f"**{head}**\n\n" + re.sub(r"^    (\w+(?:, \w+)*): ", r"- `\1`: ", items, flags=re.M)
        elif head.startswith(">>> "):
            blocks[i] = f"```python\n{block}\n```"
    return "\n\n".join(blocks)


def parameter(f: Field) -> Parameter:
    """A dataclass's field as a parameter of its signature."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    default = Parameter.empty if default is MISSING else default
    return Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=formatannotation(f.type))


get_config()["renderer"] = "docs.Renderer"  # nbdev imports it by this name


class Filter(FilterDefaults):
    """What nbdev does to each notebook, and more: each exported definition in a cell of its own, below its documentation;
    the source of `#| exporti` cells; long sources folded; the name of its module and a link to Colab below the title.
    """

    def base_procs(self) -> list:
        procs = super().base_procs()
        procs.insert(procs.index(rm_export), keep_internal)
        return procs

    def __call__(self, nb: dict) -> None:
        module = module_line(nb)  # nbdev takes the directive that names it out
        nb.cells = [NbCell(i, c) for i, c in enumerate(piece for cell in nb.cells for piece in pieces(cell))]
        super().__call__(nb)
        for cell in nb.cells:
            lines = cell.source.count("\n") - 1  # two lines are options
            if "#| code-fold: show" in cell.source and lines > SEEN_AT_ONCE:
                cell.source = cell.source.replace("#| code-fold: show", "#| code-fold: true", 1)
        where = "\n\n".join(filter(None, (module, colab(Path(nb.path_)))))
        nb.cells.insert(1, mk_cell(where, "markdown"))  # the first cell is front matter: the title


nbdev.serve.FilterDefaults = Filter  # `proc_nbs` takes no other


def keep_internal(cell: NbCell) -> None:
    """Show a cell `#| exporti` as one of `#| exports`, after nbdev has put the references: its names get none."""
    if "exporti" in cell.directives_:
        cell.directives_["exports"] = cell.directives_.pop("exporti")


def pieces(cell: dict) -> list[dict]:
    """An exported cell, cut after each definition; any other cell as it is."""
    if cell.cell_type != "code" or not re.match(r"#\| *exports\b", cell.source):
        return [cell]
    options = re.match(r"(#\|.*\n)*", cell.source)[0]
    lines = cell.source.splitlines()
    ends = [n.end_lineno for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    cuts = pairwise([options.count("\n"), *ends, len(lines)])
    sources = [options + text for a, b in cuts if (text := "\n".join(lines[a:b]).strip("\n"))]
    outputs = [[]] * (len(sources) - 1) + [cell.outputs]
    bare = {k: v for k, v in cell.items() if k != "id"}
    return [{**bare, "source": s, "outputs": o} for s, o in zip(sources, outputs, strict=True)]


def module_line(nb: dict) -> str:
    """Where Python finds what a page of the API defines; nothing for other pages."""
    name = next((m[1] for c in nb.cells if (m := re.search(r"^#\| *default_exp (\S+)", c.source, re.M))), None)
    return f"`lor2c.{name}`{{.module}}" if name else ""


def colab(notebook: Path) -> str:
    """The link that opens a notebook in Colab, and what its reader runs first: pages read files of the repository."""
    cfg = get_config()
    path = notebook.relative_to(cfg.config_path)
    names = {k: cfg[k] for k in ("user", "repo", "branch", "git_url")}
    return COLAB.format(**names, path=path.as_posix(), folder=path.parent.as_posix())


class NbdevSite(Site):
    """A smalldocs site whose pages are named as nbdev names them: `00_lowrank.ipynb` becomes `lowrank.html`."""

    def read(self, src) -> Page:
        page = super().read(src)
        page.out = page.out.with_name(page.front.get("output-file", page.out.name))
        return page

    def write_llms_txt(self) -> None:
        """`llms.txt` in the sidebar's order and sections, and with what each page says of itself."""
        web = self.project.website
        lines = [f"# {web['title']}", "", f"> {web['description']}"]
        for item in SiteNav(self).sidebars[0]["items"]:
            lines += ["", f"## {html.unescape(item.text)}", ""]
            for page in item.pages():
                address = f"{web['site-url']}/{page.out.with_suffix('.llms.md')}"
                lines.append(f"- [{page.title}]({address}): {page.front['description']}")
        (self.out / "llms.txt").write_text("\n".join(lines) + "\n", "utf-8")


def process() -> Path:
    """Let nbdev put `show_doc` for exported code, take hidden cells out and link names; returns its folder."""
    refresh_quarto_yml()
    index()
    proc = proc_nbs(force=True, n_workers=0)  # in this process: each worker would import torch first
    pages = list(proc.rglob("*.ipynb"))
    base = get_config().doc_host + get_config().doc_baseurl
    links = {f"({base}/{name}": f"(/{p.relative_to(proc).as_posix()}" for p in pages if (name := html_name(p, proc))}
    for p in pages:  # nbdev's links name the published site; inside the site they are links between its pages
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
