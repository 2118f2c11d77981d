"""What the site shows of a notebook: nbdev's processors, and ours in place of some."""

import ast
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from inspect import Parameter, Signature, formatannotation
from itertools import pairwise
from pathlib import Path

import nbdev.serve
from execnb.nbio import NbCell, mk_cell
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, add_links, rm_export
from nbdev.showdoc import BasicMarkdownRenderer

MANY = 4  # lines of imports: from there on they are folded, because a page begins with its point
SEEN_AT_ONCE = 40  # lines of code that fit a laptop's screen: longer sources are folded
COLAB = """::: {{.colab}}
[Open in Colab](https://colab.research.google.com/github/{user}/{repo}/blob/{branch}/{path})
:::"""
CODE_OR_LINK = re.compile(r"(^```.*?^```$|!?\[[^\]\n]*\]\([^)\n]*\))", re.M | re.S)
MODULES = re.compile(r"('[^']*')|~|\b(?:\w+\.)+(?=\w)")  # in an annotation, not in its strings
CODE_OR_SIGN = re.compile(r"((`+).*?\2)|([*_^~$<\\\[\]]|--)", re.S)


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
        for told in self.dm.dm.values():
            told.anno = brief(told.anno)
        self.docs = sections(self.docs or "")


def sections(docstring: str) -> str:
    """A docstring with its `Args:` and `Raises:` as lists and its examples as code: Markdown would run their lines together.
    Any other sign stands for itself, above all the `*` of a formula."""
    blocks = docstring.split("\n\n")
    for i, block in enumerate(blocks):
        head, _, body = block.partition("\n")
        if head in ("Args:", "Returns:", "Raises:"):
            items = re.sub(r"\n {8,}", " ", body)  # an item's further lines are deeper
            items = re.sub(r"^    (\w+(?:, \w+)*): ", r"- `` \1 ``: ", items, flags=re.M)  # with spaces, no link
            blocks[i] = f"**{head}**\n\n{escaped(items)}"
        elif head.startswith(">>> "):
            blocks[i] = f"```python\n{block}\n```"
        else:
            blocks[i] = escaped(block)
    return "\n\n".join(blocks)


def escaped(text: str) -> str:
    """Text whose signs mean nothing to Markdown, but for those of code."""
    return CODE_OR_SIGN.sub(lambda m: m[1] or "".join(f"\\{sign}" for sign in m[3]), text)


def parameter(f: Field) -> Parameter:
    """A dataclass's field as a parameter of its signature."""
    default = f.default if f.default_factory is MISSING else f.default_factory()
    default = Parameter.empty if default is MISSING else default
    return Parameter(f.name, Parameter.KEYWORD_ONLY, default=default, annotation=brief(f.type))


def brief(annotation: object) -> object:
    """An annotation as we write it: with what stands in its brackets, which nbdev drops, and without names of modules."""
    if annotation is Parameter.empty or isinstance(annotation, str):
        return annotation
    return MODULES.sub(lambda m: m[1] or "", formatannotation(annotation))


get_config()["renderer"] = "pages.Renderer"  # nbdev imports it by this name


class Filter(FilterDefaults):
    """What nbdev does to each notebook, and more: each exported definition in a cell of its own, below its documentation;
    the source of `#| exporti` cells; long sources and imports folded; a stream that a kernel sent in pieces in one; the name
    of its module and a link to Colab below the title, and not the cell that Colab needs.
    """

    def base_procs(self) -> list:
        procs = super().base_procs()
        procs.insert(procs.index(rm_export), keep_internal)
        procs[procs.index(add_links)] = link_names
        return procs

    def __call__(self, nb: dict) -> None:
        module = module_line(nb)  # nbdev takes the directive that names it out
        shown = [cell for cell in nb.cells if cell.get("id") != "colab"]
        shown.append(mk_cell("", "markdown"))  # nbdev looks at the cell after each exported one, and does not ask for it
        nb.cells = [NbCell(i, c) for i, c in enumerate(piece for cell in shown for piece in pieces(cell))]
        super().__call__(nb)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = whole(cell.outputs)
            lines = cell.source.count("\n") - 1  # two lines are options
            if "#| code-fold: show" in cell.source and lines > SEEN_AT_ONCE:
                cell.source = cell.source.replace("#| code-fold: show", "#| code-fold: true", 1)
            elif cell.cell_type == "code" and lines + 2 >= MANY and only_imports(cell.source):
                cell.source = f"#| code-fold: true\n#| code-summary: Imports\n{cell.source}"
        where = "\n\n".join(filter(None, (module, colab(Path(nb.path_)))))
        nb.cells.insert(1, mk_cell(where, "markdown"))  # the first cell is front matter: the title


nbdev.serve.FilterDefaults = Filter  # `proc_nbs` takes no other


def keep_internal(cell: NbCell) -> None:
    """Show a cell `#| exporti` as one of `#| exports`, after nbdev has put the references: its names get none."""
    if "exporti" in cell.directives_:
        cell.directives_["exports"] = cell.directives_.pop("exporti")


def link_names(cell: NbCell) -> None:
    """Link names of the API where nbdev's own `add_links` does, but neither in code that an output shows nor in a link."""
    if cell.cell_type == "markdown":
        cell.source = linked(cell.source)
    for data in (out["data"] for out in cell.get("outputs", []) if "text/markdown" in out.get("data", {})):
        data["text/markdown"] = linked("".join(data["text/markdown"])).splitlines(keepends=True)


def linked(markdown: str) -> str:
    """Text in which each name of the API leads to its entry."""
    link, parts = NbdevLookup().link_line, CODE_OR_LINK.split(markdown)
    parts[::2] = [re.sub(r"^(?! {4}).+", lambda m: link(m[0]), part, flags=re.M) for part in parts[::2]]
    return "".join(parts)


def only_imports(code: str) -> bool:
    """Whether a cell imports and does nothing else."""
    try:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body)
    except SyntaxError:  # a line for IPython
        return False


def whole(outputs: list[dict]) -> list[dict]:
    """A cell's outputs, and what comes from one stream without a break as one."""
    found: list[dict] = []
    for out in outputs:
        if found and "name" in out and out["name"] == found[-1].get("name"):
            found[-1]["text"] = [*found[-1]["text"], *out["text"]]
        else:
            found.append(out)
    return found


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
    """The link that opens a notebook in Colab."""
    return COLAB.format(**{k: get_config()[k] for k in ("user", "repo", "branch")}, path=notebook.as_posix())
