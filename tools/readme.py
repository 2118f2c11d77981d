"""Write README.md from nbs/index.ipynb; with `--check`, only say whether it is up to date."""

import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs/index.ipynb"
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)
HIDDEN = re.compile(r"^\s*#\s*\|\s*(hide\b(?!_)|include:\s*false)", re.M)
NO_CODE = re.compile(r"^\s*#\s*\|\s*echo:\s*false", re.M)
CALLOUT = re.compile(r"^:{3,} *\{\.callout-(note|tip|important|warning|caution)[^}\n]*\}\n(.*?)^:{3,} *$", re.M | re.S)
DIV = re.compile(r"^:{3,}.*\n", re.M)  # what the site alone lays out, such as cards
FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def visible(nb: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as a reader of the site sees it: hidden cells out, directives and front matter too."""
    nb.cells = [c for c in nb.cells if c.cell_type != "raw" and not HIDDEN.search(c.source)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = "" if NO_CODE.search(cell.source) else DIRECTIVE.sub("", cell.source)
            if any(m.startswith("image/") for o in cell.outputs for m in o.get("data", {})):
                raise SystemExit("index.ipynb: a cell outputs a picture: save it in nbs/images and link it instead")
    nb.metadata.language_info = {"name": "python"}  # nbdev_clean drops it, and the code fences need it
    return nb


def alert(callout: re.Match) -> str:
    """A Quarto callout as a GitHub alert."""
    kind, body = callout[1], re.sub(r"^#+ (.*)", r"**\1**\n", callout[2].strip(), count=1)
    return "\n".join([f"> [!{kind.upper()}]", *(f"> {line}".rstrip() for line in body.splitlines())])


def from_root(link: re.Match) -> str:
    """A link from nbs/ as a link from the root of the repository."""
    path = posixpath.normpath("nbs/" + link[2])
    if not (ROOT / path).exists():
        raise SystemExit(f"index.ipynb: link to {link[2]}, but there is no {path}")
    return link[1] + path


def readme() -> str:
    """What README.md should say."""
    text, _ = MarkdownExporter().from_notebook_node(visible(nbformat.read(INDEX, as_version=4)))
    text = CALLOUT.sub(alert, text.replace("```python\n\n```\n", ""))  # an echo: false leaves an empty block
    text = DIV.sub("", text)
    parts = FENCED.split(text)
    parts[::2] = [re.sub(r"\n{3,}", "\n\n", LINK.sub(from_root, p)) for p in parts[::2]]  # code blocks are the odd ones
    text = "".join(parts).strip()
    return f"<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n\n{text}\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md is not what nbs/index.ipynb says")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    if not check:
        path.write_text(readme(), encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != readme():
        sys.exit("README.md is not what nbs/index.ipynb says: run `make readme`")
