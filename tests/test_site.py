"""The rendered site, served on localhost and read in a browser."""

import functools
import gzip
import html
import inspect
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from conftest import ROOT, copy_repository, notebooks, run
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

import lor2c

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Nothing is looked up elsewhere, and a browser run by root (as in a container) has no sandbox.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rendered site, of a checkout that stands below a folder with a leading dot."""
    repository = copy_repository(tmp_path_factory.mktemp("site") / ".hidden/lor2c")
    run("python", "tools/docs.py", cwd=repository)
    return repository / "_docs"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served while its tests run."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A headless Chromium with a profile of its own."""
    if not (CHROMIUM and DRIVER):
        missing = pytest.fail if os.environ.get("LOR2C_REQUIRE_BROWSER") else pytest.skip
        missing("no chromium or no chromedriver on the PATH")
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = Chrome(options, ChromeService(DRIVER))
    yield driver
    driver.quit()


# What the files say


class Page(HTMLParser):
    """The links, anchors and pictures of a page, and its text."""

    VOID = {"br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
    FETCHED = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sidebar: list[str] = []
        self.neighbours: list[str] = []  # previous and next
        self.pictures: list[dict[str, str | None]] = []
        self.anchors: set[str] = {"", "top"}
        self.fetched: list[str] = []
        self.prose: list[str] = []  # without code, scripts and equations
        self.code: list[str] = []
        self.code_links: list[str] = []  # those of a block, other than to its own lines
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        classes = (given.get("class") or "").split()
        self.anchors |= {v for k in ("id", "name") if (v := given.get(k))}
        self.links += [v for k in ("href", "src") if (v := given.get(k))]
        self.sidebar += [given["href"]] if "sidebar-link" in classes and given.get("href") else []
        self.neighbours += [given["href"]] if "pagination-link" in classes else []
        self.pictures += [given] if tag == "img" else []
        link = given.get(self.FETCHED.get(tag, ""))
        self.fetched += [link] if link and given.get("rel") not in ("canonical", "next", "prev") else []
        link = given.get("href") or "#cb"
        self.code_links += [link] if tag == "a" and "pre" in self.open and not link.startswith("#cb") else []
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:  # a paragraph needs no end
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text.append(data)
            code = bool({"pre", "code"} & set(self.open))
            self.code += [data] if code else []
            self.prose += [] if code or "math" in self.open else [data]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def internal(path: Path, link: str, site: Path) -> tuple[Path, str] | None:
    """The file and the anchor that a link on a page leads to, if it stays in the site."""
    url = urlsplit(link)
    if url.scheme or url.netloc:
        return None
    base = site if url.path.startswith("/") else path.parent
    to = base / unquote(url.path).lstrip("/") if url.path else path
    return (to / "index.html" if to.is_dir() else to).resolve(), unquote(url.fragment)


def page_of(notebook: Path) -> str:
    """Where a notebook's page is in the site."""
    return re.sub(r"/\d+_", "/", notebook.relative_to("nbs").with_suffix(".html").as_posix())


def test_links_and_anchors_resolve(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if target := internal(path, link, site):
                to, anchor = target
                if not to.exists() or (to in pages and anchor not in pages[to].anchors):
                    broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_every_notebook_has_its_page(site: Path, pages: dict[Path, Page]) -> None:
    assert {p.relative_to(site).as_posix() for p in pages} == {"changelog.html", *map(page_of, notebooks())}


def test_previous_and_next_follow_the_sidebar(site: Path, pages: dict[Path, Page]) -> None:
    home = (site / "index.html").resolve()
    order = [internal(home, link, site)[0] for link in pages[home].sidebar]
    assert order[0] == home and len(order) == len(set(order))
    left_out = [p.relative_to(site).as_posix() for p in pages if p not in order]
    assert left_out == [], "add it to the sidebar in _quarto.yml"
    for before, path, after in zip([None, *order], order, [*order[1:], None], strict=False):
        leads = [internal(path, link, site)[0] for link in pages[path].neighbours]
        assert leads == [p for p in (before, after) if p], path
    api = [p.relative_to(site).as_posix() for p in order if "api" in p.parts]
    chapters = list(dict.fromkeys(Path(p).parent.as_posix() for p in api))
    numbered = [page_of(p) for p in notebooks() if "api" in p.parts]
    assert api == sorted(numbered, key=lambda p: chapters.index(Path(p).parent.as_posix()))  # in a chapter, by number


def test_pages_open_in_colab(site: Path) -> None:
    where = "https://colab.research.google.com/github/lor2c/lor2c/blob/main/"
    for notebook in notebooks():
        text = (site / page_of(notebook)).read_text("utf-8")
        assert re.findall(rf'href="{where}([^"]*)"', text) == [notebook.as_posix()]
        assert "google.colab" not in text  # the cell that sets it up there is not for readers here


def test_pictures_say_what_they_show(site: Path, pages: dict[Path, Page]) -> None:
    silent = [
        f"{path.relative_to(site)}: {(picture.get('src') or '')[:60]}"
        for path, page in pages.items()
        for picture in page.pictures
        if len((picture.get("alt") or "").split()) < 4
    ]
    assert silent == [], "a cell that draws begins with `#| fig-alt: ...`"


def test_equations_are_mathml(site: Path, pages: dict[Path, Page]) -> None:
    text = {p.relative_to(site).as_posix(): p.read_text("utf-8") for p in pages}
    assert any("<math" in t for t in text.values())
    raw = re.compile(r'class="math[^>]*>\s*\\[(\[]|katex|mathjax', re.I)
    assert [name for name, t in text.items() if raw.search(t)] == []


def test_there_is_a_copy_for_language_models(site: Path, pages: dict[Path, Page]) -> None:
    """In reading order, each with what its page says of itself."""
    index = (site / "llms.txt").read_text("utf-8")
    assert index.startswith("# lor2c\n")
    copies = re.findall(r"^- \[.+\]\(https://lor2c\.github\.io/lor2c/(\S+)\): \S+ \S+ ", index, re.M)
    home = (site / "index.html").resolve()
    order = [internal(home, link, site)[0] for link in pages[home].sidebar]
    assert [(site / c).resolve() for c in copies] == [p.with_suffix(".llms.md") for p in order]
    assert all((site / c).is_file() for c in copies)
    sections = "Home", "What works", "Methods", "Tutorials", "How-to", "Explanations", "Coming from PEFT", "API", "Results"
    assert tuple(re.findall("^## (.+)", index, re.M)) == (*sections, "What changed")


def test_a_link_elsewhere_shows_a_card(site: Path, pages: dict[Path, Page]) -> None:
    card = r'property="og:image" content="https://lor2c.github.io/lor2c/([^"]+)"'
    shown = {p.relative_to(site).as_posix(): re.findall(card, p.read_text("utf-8")) for p in pages}
    assert {name: found for name, found in shown.items() if found != ["images/card.png"]} == {}
    assert (site / "images/card.png").stat().st_size < 100_000


def test_readers_can_mend_a_page(site: Path, pages: dict[Path, Page]) -> None:
    """Each links to its own source, which is there, and to a place for problems. The footer has the version."""
    for path, page in pages.items():
        edit = [link.partition("/edit/main/")[2] for link in page.links if "/edit/main/" in link]
        assert len(edit) == 1 and (ROOT / edit[0]).is_file(), path
        assert path.name == "changelog.html" or page_of(Path(edit[0])) == path.relative_to(site.resolve()).as_posix()
        assert any(link.endswith("/issues/new") for link in page.links), path
        assert f"lor2c {lor2c.__version__} · " in "".join(page.text), path


def test_an_address_that_is_not_there(site: Path) -> None:
    """Its page finds its style at any depth, because its links begin at the root of the published site."""
    page = Page(site / "404.html")
    assert '<base href="/lor2c/">' in (site / "404.html").read_text("utf-8") and "index.html" in page.links


def test_the_sitemap_is_in_reading_order(site: Path, pages: dict[Path, Page]) -> None:
    home = (site / "index.html").resolve()
    order = [internal(home, link, site)[0].relative_to(site.resolve()).as_posix() for link in pages[home].sidebar]
    found = re.findall("<loc>https://lor2c.github.io/lor2c/([^<]+)</loc>", (site / "sitemap.xml").read_text("utf-8"))
    assert found == order


def test_the_index_of_the_search_is_small(site: Path) -> None:
    entries = json.loads((site / "search.json").read_text("utf-8"))
    assert (site / "search.json").stat().st_size < 400_000
    assert len(entries) > 500 and sum(len(entry["text"]) for entry in entries) > 100_000  # cut, and not away


def test_no_markdown_is_left(site: Path, pages: dict[Path, Page]) -> None:
    """Neither in prose nor as links in the code of a signature."""
    raw = re.compile(r".{,40}(?:\]\(|\*\*|`|:::|\{\.|\]\{).{,40}")
    link = re.compile(r".{,40}\]\((?:https?:|/|\.\./).{,40}")
    found = {p: raw.findall("".join(page.prose)) + link.findall("".join(page.code)) for p, page in pages.items()}
    assert {p.relative_to(site).as_posix(): f for p, f in found.items() if f} == {}
    assert [link for page in pages.values() for link in page.code_links] == []


def bare(text: str) -> str:
    """Text without the signs that a renderer may set in another way: quotes, dashes, dots, spaces."""
    for nice, plain in {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "…": "..."}.items():
        text = text.replace(nice, plain)
    return re.sub(r"[\s`]+", "", text)


def test_docstrings_keep_their_formulas(site: Path, pages: dict[Path, Page]) -> None:
    """The first paragraph of each entry is what `help` says, to the last `*`."""
    lost, formulas = [], 0
    for notebook in (n for n in notebooks() if "api" in n.parts):
        page = (site / page_of(notebook)).resolve()
        shown = bare("".join(pages[page].prose))
        name = re.search(r"#\| default_exp ([\w.]+)", (ROOT / notebook).read_text("utf-8"))[1]
        module = import_module(f"lor2c.{name}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and value.__module__ == module.__name__ and (said := inspect.getdoc(value)):
                first = bare(re.sub("`[^`]*`", "", said.split("\n\n")[0]))
                formulas += "*" in first
                lost += [] if first in shown else [f"{module.__name__}.{name}: {said[:80]}"]
    assert lost == [] and formulas > 3


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    away = re.compile(r"(?:https?:)?//")
    found = [f"{p.relative_to(site)}: {link}" for p, page in pages.items() for link in page.fetched if away.match(link)]
    imported = re.compile(r"(?:@import\s*|url\(\s*)[\"']?(?:url\(\s*[\"']?)?((?:https?:)?//[^\"')\s]+)")
    for css in site.rglob("*.css"):
        found += [f"{css.relative_to(site)}: {link}" for link in imported.findall(css.read_text("utf-8"))]
    assert found == []


def test_a_stream_is_shown_whole(pages: dict[Path, Page]) -> None:
    """A kernel sends it in pieces, and each would be a box of its own."""
    output = r'<div class="cell-output {}">\s*<pre[^>]*>\s*<code>[^<]*</code></pre>\s*</div>\s*'
    cut = re.compile(output.format("(cell-output-std[a-z]+)") + output.format(r"\1"))
    assert [p for p in pages if cut.search(p.read_text("utf-8"))] == []


def test_internal_names_are_shown_without_an_entry(site: Path, pages: dict[Path, Page]) -> None:
    """The source of a cell `#| exporti` stands on its page, but only what users call has an entry there."""
    wrong = []
    for notebook in (n for n in notebooks() if "api" in n.parts):
        page = (site / page_of(notebook)).resolve()
        text = html.unescape(re.sub(r"<[^>]*>", "", page.read_text("utf-8")))
        for cell in json.loads((ROOT / notebook).read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            internal = re.findall(r"^(?:def|class) (\w+)", source, re.M) if source.startswith("#| exporti") else []
            hidden = [n for n in internal if not re.search(rf"\b(def|class) {n}\b", text)]
            wrong += [f"{notebook}: {n}" for n in internal if n in hidden or n.lower() in pages[page].anchors]
    assert wrong == []


def test_signatures_keep_their_types(site: Path) -> None:
    """`decisions: list[Due]` is no `list`, and a choice shows what there is to choose."""
    pages = [html.unescape(re.sub("<[^>]+>", "", p.read_text("utf-8"))) for p in (site / "api").rglob("*.html")]
    # the source below has a space between a name and its type
    shown = [entry for page in pages for entry in re.findall(r"^def \w+\(\n(?: {4}\w+:\S.*\n)+\).*", page, re.M)]
    bare = r"(?:\b\w+:|->)(?:dict|list|tuple|Callable|Iterable|Literal|Mapping|Sequence)\b(?!\[).*"
    assert len(shown) > 100 and [line for entry in shown for line in re.findall(bare, entry)] == []
    signatures = "\n".join(shown)
    assert "keep:Literal['more_information', 'first', 'second', 'fitted']=" in signatures and "collections.abc" not in signatures


def test_imports_are_folded(site: Path) -> None:
    """A page begins with its point; who needs the imports opens them."""
    folded = [p for p in site.rglob("*.html") if re.search(r"<summary>Imports</summary>", p.read_text("utf-8"))]
    assert len(folded) > 30


LONGEST = 25  # lines; with prose above and below, they fit a phone's screen and a laptop's
UNSEEN = re.compile(r"^\s*#\s*\|\s*(hide\b(?!_)|echo:\s*false|include:\s*false|export[is]?\b)", re.M)  # exports: see below


def test_cells_are_seen_at_once() -> None:
    long = []
    for notebook in notebooks():
        for cell in json.loads((ROOT / notebook).read_text("utf-8"))["cells"]:
            source = "".join(cell["source"])
            lines = [line for line in source.splitlines() if not line.startswith("#|")]
            if cell["cell_type"] == "code" and not UNSEEN.search(source) and len(lines) > LONGEST:
                long.append(f"{notebook}: {len(lines)} lines from {lines[0]!r}")
    assert long == [], "cut it in two, with a sentence between"


def test_cell_options_are_yaml() -> None:
    """An option that is not is lost in one renderer, with all others of its cell, and an error in the other."""
    wrong = []
    for notebook in notebooks():
        for cell in json.loads((ROOT / notebook).read_text("utf-8"))["cells"]:
            for option in re.findall(r"^#\| *([\w-]+: .*)", "".join(cell["source"]), re.M):
                try:
                    yaml.safe_load(option)
                except yaml.YAMLError:
                    wrong.append(f"{notebook}: {option[:80]}")
    assert wrong == [], "put the text into double quotes"


# What a reader sees


def resize(browser: Chrome, width: int = 1280, scheme: str = "light") -> None:
    """Give the page a width, and a reader who prefers light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    prefers = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [prefers]})


def visit(browser: Chrome, url: str, width: int = 1280, scheme: str = "light") -> None:
    resize(browser, width, scheme)
    browser.get(url)
    wait(browser, lambda b: b.execute_script("return document.readyState") == "complete")


def wait(browser: Chrome, for_what: Callable[[Chrome], object], message: str = "") -> object:
    return WebDriverWait(browser, 20, poll_frequency=0.05).until(for_what, message)


def find(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def settled(element: WebElement) -> bool:
    """Whether a part of the page that opens is open."""
    return element.is_displayed() and "collapsing" not in element.get_attribute("class")


def luminance(browser: Chrome, selector: str, style: str) -> float:
    """From 0, black, to 1, white."""
    colour = browser.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{style}")
    red, green, blue = (int(c) / 255 for c in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# By what is wrong, what of it there is on a page as wide as a laptop's screen. `faint`: text with less contrast than
# WCAG 2 AA asks, 4.5, or 3 if it is large; pictures and what is behind them are not looked at.
FAINT = """
const rgba = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
const over = (a, b) => [0, 1, 2].map((i) => a[i] * a[3] + b[i] * (1 - a[3]));
const ground = (e) => { if (!e) return [255, 255, 255];
    const c = rgba(getComputedStyle(e).backgroundColor); return c[3] === 1 ? c.slice(0, 3) : over(c, ground(e.parentElement)); };
const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const light = (c) => { const [r, g, b] = c.map((x) => linear(x / 255)); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = (e) => { const below = ground(e), a = light(over(rgba(getComputedStyle(e).color), below)), b = light(below);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); };
const large = (s) => parseFloat(s.fontSize) >= 24 || (parseFloat(s.fontSize) >= 18.6 && s.fontWeight >= 700);
const faint = () => { const found = {};
    for (const e of document.querySelectorAll("main *, footer *, #quarto-sidebar a, .navbar a")) {
        const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!own || !e.getClientRects().length || e.closest("math, svg, [aria-hidden=true]")) continue;
        const c = contrast(e), kind = `${e.tagName}.${e.className}`;
        if (c < (large(getComputedStyle(e)) ? 3 : 4.5)) found[kind] ??= `${c.toFixed(1)} ${e.innerText.slice(0, 30)}`;
    }
    return Object.entries(found).map(([k, v]) => `${k}: ${v}`); };
"""
WRONG = FAINT + """
const done = arguments[arguments.length - 1], all = (s) => [...document.querySelectorAll(s)];
let moved = 0;
const add = (seen) => seen.getEntries().filter((s) => !s.hadRecentInput).forEach((s) => { moved += s.value; });
new PerformanceObserver(add).observe({ type: "layout-shift", buffered: true });
const start = (e) => e.outerHTML.slice(0, 100), flat = (e) => !e.getBoundingClientRect().height;
document.fonts.ready.then((fonts) => setTimeout(() => done({
    "fetched from elsewhere": performance.getEntriesByType("resource").map((r) => r.name)
        .filter((n) => !n.startsWith(location.origin) && !n.startsWith("data:")),
    "faint": faint(),
    "moves while it loads": [moved].filter((sum) => sum > 0.1),
    "taken out of turn by the keyboard": all("[tabindex]").filter((e) => e.tabIndex > 0).map(start),
    "no language": document.documentElement.lang ? [] : ["html"],
    "not one title": all("h1").length === 1 ? [] : all("h1").map(start),
    "heavy": performance.getEntriesByType("resource").map((r) => r.name),  // see `weight`
    "no picture": all("main img").filter((i) => !i.naturalWidth).map(start),
    "no equation": all("main math").filter((m) => flat(m) && !m.closest("details:not([open])")).map(start),
    "no font for equations": all("main math").length && ![...fonts].some((f) =>
        f.family.includes("IBM Plex Math") && f.status === "loaded") ? ["IBM Plex Math"] : [],
    "command cut off": all("main pre.sh").filter((e) => e.scrollWidth > e.clientWidth).map(start),
    "too long to be seen at once": all("main pre code").filter((c) => !flat(c) && c.innerText.trim().split("\\n").length > 44)
        .map((c) => c.innerText.slice(0, 80)),
}), 20));
"""
# On a phone: what sticks out on the right and is in no box that scrolls, so that a reader never gets to see it.
CUT_OFF = """
document.querySelectorAll("main details").forEach((e) => { e.open = true; });
const wide = (s) => [...document.querySelectorAll(s)].filter((e) => e.scrollWidth > e.clientWidth + 1);
const clear = (e) => getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)";  // what is painted below it is seen
const hints = (e) => getComputedStyle(e).backgroundAttachment.includes("local") && [...e.querySelectorAll("td")].every(clear);
const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
return {
    "wider than a phone": document.documentElement.scrollWidth > 390 ? [document.documentElement.scrollWidth] : [],
    "no hint that it goes on": wide("main table, main .cell-output pre:not(.sourceCode)").filter((e) => !hints(e))
        .map((e) => e.outerHTML.slice(0, 100)),
    "command cut off": wide("main pre.sh, main pre.prose").map((e) => e.outerHTML.slice(0, 100)),
    "cut off on a phone": [...document.querySelectorAll("main *")]
        .filter((e) => e.getBoundingClientRect().right > 391 && !scrolls(e)).map((e) => e.outerHTML.slice(0, 100)),
};
"""


HEAVIEST = 300_000  # bytes of a page, without figures and the font of its equations, which all pages share


@functools.cache
def compressed(file: Path) -> int:
    """The bytes of a file as GitHub Pages sends it."""
    return file.stat().st_size if file.suffix.startswith(".woff") else len(gzip.compress(file.read_bytes()))


def weight(site: Path, names: list[str]) -> int:
    """The bytes of what a page loads, pictures in it and beside it apart."""
    page = re.sub(rb'"data:image[^"]*"', b"", (site / names[0]).read_bytes())
    files = {site / urlsplit(name).path for name in names[1:]}
    other = [f for f in files if f.is_file() and f.suffix not in (".png", ".svg", ".json") and "IBMPlexMath" not in f.name]
    return len(gzip.compress(page)) + sum(map(compressed, other))


def test_pages_work_without_a_network(browser: Chrome, address: str, site: Path, pages: dict[Path, Page]) -> None:
    found = {}
    browser.get_log("browser")  # empties it
    for path in pages:
        name = path.relative_to(site).as_posix()
        visit(browser, address + name)
        wrong = browser.execute_async_script(WRONG)
        heavy = weight(site, [name, *(link.removeprefix(address) for link in wrong["heavy"])])
        wrong["heavy"] = [heavy] if heavy > HEAVIEST else []
        resize(browser, width=390)
        wrong |= browser.execute_script(CUT_OFF)
        wrong["console"] = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        found |= {f"{name}: {what}": which for what, which in wrong.items() if which}
    assert found == {}


def test_home_and_its_menu(browser: Chrome, address: str) -> None:
    visit(browser, address)
    assert "lor2c" in browser.title and "lor2c" in find(browser, "h1").text
    entries = browser.find_elements(By.CSS_SELECTOR, "#navbarCollapse .navbar-nav.me-auto a.nav-link")
    names = "Home", "Methods", "Tutorials", "How-to", "Explanations", "Coming from PEFT", "API", "Results"
    assert tuple(a.text for a in entries) == names
    name, first = browser.find_element(By.CSS_SELECTOR, ".navbar-title"), browser.find_element(By.CSS_SELECTOR, ".nav-link")
    assert name.rect["x"] + name.rect["width"] < first.rect["x"]  # they don't lie on one another


def test_the_menus_open_on_a_phone(browser: Chrome, address: str) -> None:
    visit(browser, address, width=390)
    menu, sidebar = find(browser, "#navbarCollapse"), find(browser, "#quarto-sidebar")
    assert not menu.is_displayed()
    find(browser, ".navbar-toggler").send_keys(Keys.ENTER)
    wait(browser, lambda _: settled(menu))
    assert "API" in menu.text
    find(browser, ".navbar-toggler").click()
    wait(browser, lambda _: not menu.is_displayed())
    find(browser, ".quarto-secondary-nav .quarto-btn-toggle").click()
    wait(browser, lambda _: settled(sidebar) and sidebar.rect["x"] >= 0)
    link = sidebar.find_element(By.CSS_SELECTOR, "a[href$='howto/trl.html']")
    assert not link.is_displayed()  # its section is folded
    section(sidebar, "How-to").click()
    wait(browser, lambda _: settled(link.find_element(By.XPATH, "ancestor::ul[1]")))
    link.click()
    wait(browser, lambda b: b.current_url.endswith("howto/trl.html"))


def section(sidebar: WebElement, name: str) -> WebElement:
    """What opens a section of the sidebar."""
    [found] = [a for a in sidebar.find_elements(By.CSS_SELECTOR, "a.sidebar-item-text:not([href])") if a.text == name]
    return found


def test_keyboard(browser: Chrome, address: str) -> None:
    visit(browser, address + "api/training/surgery.html")
    press(browser, Keys.TAB)
    skip = browser.switch_to.active_element
    assert skip.text == "Skip to the text" and skip.rect["height"] > 20
    press(browser, Keys.ENTER)
    press(browser, Keys.TAB)
    assert browser.execute_script("return document.querySelector('main').contains(document.activeElement)")
    shown = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert shown != "none"
    sidebar = find(browser, "#quarto-sidebar")
    browser.execute_script("arguments[0].focus()", section(sidebar, "How-to"))
    press(browser, Keys.ENTER)
    wait(browser, lambda _: sidebar.find_element(By.CSS_SELECTOR, "a[href$='howto/trl.html']").is_displayed())


def press(browser: Chrome, key: str) -> None:
    ActionChains(browser).send_keys(key).perform()


def test_light_and_dark(browser: Chrome, address: str) -> None:
    visit(browser, address)
    assert luminance(browser, "body", "backgroundColor") > 0.8 > 0.4 > luminance(browser, "main p", "color")
    find(browser, ".quarto-color-scheme-toggle").click()
    wait(browser, lambda b: luminance(b, "body", "backgroundColor") < 0.3)
    for text in ("main p", "main math", "main pre code"):  # the theme and the code's colours do not switch at once
        wait(browser, lambda b, t=text: luminance(b, t, "color") > 0.6, text)
    browser.execute_script("localStorage.clear()")
    visit(browser, address, scheme="dark")  # who prefers dark gets it unasked
    assert luminance(browser, "body", "backgroundColor") < 0.3
    assert luminance(browser, "main p", "color") > 0.6
    for name in ("index.html", "api/tuners/config.html", "results/comparison.html"):
        visit(browser, address + name, scheme="dark")
        assert browser.execute_script(FAINT + "return faint();") == [], name


def test_code_is_copied(browser: Chrome, address: str) -> None:
    visit(browser, address + "tutorials/glue.html")
    allowed = {"origin": address.rstrip("/"), "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", allowed)
    blocks = browser.find_elements(By.CSS_SELECTOR, "main .cell div.sourceCode")
    code = next(block for block in blocks if block.is_displayed())  # imports are folded
    code.find_element(By.XPATH, "..").find_element(By.CSS_SELECTOR, ".code-copy-button").send_keys(Keys.ENTER)
    read = "navigator.clipboard.readText().then(arguments[0], (e) => arguments[0](String(e)))"
    wait(browser, lambda b: b.execute_async_script(read).strip() == code.find_element(By.TAG_NAME, "code").text.strip())


def test_search_leads_to_a_function(browser: Chrome, address: str) -> None:
    visit(browser, address)
    press(browser, "/")
    wait(browser, lambda b: b.switch_to.active_element.tag_name == "input")
    press(browser, "merge_modules")
    results = "a.search-result, .aa-Panel a"
    found = wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, results))
    assert any("api/training/surgery.html" in a.get_attribute("href") for a in found[:3])
    find(browser, "a[href*='api/training/surgery.html#merge_modules']").click()
    wait(browser, lambda b: "api/training/surgery.html#merge_modules" in b.current_url)
    assert find(browser, "[id='merge_modules'], [data-anchor-id='merge_modules']").is_displayed()
