"""The rendered site, served on localhost and read in a browser."""

import functools
import os
import re
import shutil
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import copy_repository, notebooks, run
from selenium.webdriver import Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Nothing is looked up elsewhere, and a browser run by root (as in a container) has no sandbox.
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rendered site."""
    repository = copy_repository(tmp_path_factory.mktemp("site") / "lor2c")
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
    """The links, anchors and title of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = {"", "top"}
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {v for k in ("id", "name") if (v := given.get(k))}
        self.links += [v for k in ("href", "src") if (v := given.get(k))]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def internal(path: Path, link: str, site: Path) -> tuple[Path, str] | None:
    """The file and the anchor that a link on a page leads to, if it stays in the site."""
    url = urlsplit(link)
    if url.scheme or url.netloc:
        return None
    base = site if url.path.startswith("/") else path.parent
    to = base / unquote(url.path).lstrip("/") if url.path else path
    return (to / "index.html" if to.is_dir() else to).resolve(), unquote(url.fragment)


def test_links_and_anchors_resolve(site: Path, pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if target := internal(path, link, site):
                to, anchor = target
                if not to.exists() or (to in pages and anchor not in pages[to].anchors):
                    broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_home_leads_to_every_page(site: Path, pages: dict[Path, Page]) -> None:
    home = site / "index.html"
    linked = {target[0] for link in pages[home].links if (target := internal(home, link, site))}
    alone = [str(p.relative_to(site)) for p in pages if p.resolve() not in linked]
    assert alone == [], "add it to the sidebar in _quarto.yml"


def test_every_notebook_has_its_page(site: Path, pages: dict[Path, Page]) -> None:
    expected = {re.sub(r"\d+_", "", p.relative_to("nbs").with_suffix(".html").as_posix()) for p in notebooks()}
    assert {p.relative_to(site).as_posix() for p in pages} == expected


def test_equations_are_mathml(site: Path, pages: dict[Path, Page]) -> None:
    text = {p.relative_to(site).as_posix(): p.read_text("utf-8") for p in pages}
    assert any("<math" in t for t in text.values())
    raw = re.compile(r'class="math[^>]*>\s*\\[(\[]|katex|mathjax', re.I)
    assert [name for name, t in text.items() if raw.search(t)] == []


def test_there_is_a_copy_for_language_models(site: Path, pages: dict[Path, Page]) -> None:
    index = (site / "llms.txt").read_text("utf-8")
    assert index.startswith("# ")
    assert len(re.findall(r"^- \[", index, re.M)) == len(pages)


# What a reader sees


def visit(browser: Chrome, url: str, width: int = 1280, scheme: str = "light") -> None:
    """Open a page at a width, for a reader who prefers light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    prefers = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [prefers]})
    browser.get(url)
    WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.readyState") == "complete")


def luminance(browser: Chrome, selector: str, style: str) -> float:
    """From 0, black, to 1, white."""
    colour = browser.execute_script(f"return getComputedStyle(document.querySelector('{selector}')).{style}")
    red, green, blue = (int(c) / 255 for c in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


# What sticks out on the right of a phone and is in no box that scrolls: a reader never gets to see it.
CUT_OFF = """
const scrolls = e => e && (/auto|scroll/.test(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
return [...document.querySelectorAll('main *')]
    .filter(e => e.getBoundingClientRect().right > 391 && !scrolls(e)).map(e => e.outerHTML.slice(0, 100));
"""


def test_home(browser: Chrome, address: str) -> None:
    visit(browser, address)
    assert "lor2c" in browser.title
    assert "lor2c" in browser.find_element(By.TAG_NAME, "h1").text


def test_pages_work_without_a_network(browser: Chrome, address: str, site: Path, pages: dict[Path, Page]) -> None:
    browser.get_log("browser")  # empties it
    for path in pages:
        visit(browser, address + path.relative_to(site).as_posix())
        severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        assert severe == []
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(r => r.name)")
        assert [name for name in loaded if not name.startswith((address, "data:"))] == []
        empty = "return [...document.querySelectorAll('main img')].filter(i => !i.naturalWidth).length"
        assert browser.execute_script(empty) == 0
        flat = "return [...document.querySelectorAll('math')].filter(m => !m.getBoundingClientRect().height).length"
        assert browser.execute_script(flat) == 0


def test_pages_fit_a_phone(browser: Chrome, address: str, site: Path, pages: dict[Path, Page]) -> None:
    for path in pages:
        visit(browser, address + path.relative_to(site).as_posix(), width=390)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390, path.relative_to(site)
        assert browser.execute_script(CUT_OFF) == [], path.relative_to(site)


def test_the_menu_opens_on_a_phone(browser: Chrome, address: str) -> None:
    visit(browser, address, width=390)
    menu = browser.find_element(By.ID, "navbarCollapse")
    assert not menu.is_displayed()
    browser.find_element(By.CSS_SELECTOR, ".navbar-toggler").click()
    WebDriverWait(browser, 10).until(lambda _: menu.is_displayed() and "collapsing" not in menu.get_attribute("class"))
    assert [a.text for a in menu.find_elements(By.CSS_SELECTOR, "a.nav-link")][:5] == [
        "Home",
        "Tutorials",
        "How-to",
        "Explanations",
        "API",
    ]


def test_light_and_dark(browser: Chrome, address: str) -> None:
    visit(browser, address)
    assert luminance(browser, "body", "backgroundColor") > 0.8 > 0.4 > luminance(browser, "main p", "color")
    browser.find_element(By.CSS_SELECTOR, ".quarto-color-scheme-toggle").click()
    WebDriverWait(browser, 10).until(lambda b: luminance(b, "body", "backgroundColor") < 0.3)
    for text in ("main p", "main math", "main pre code"):  # the theme and the code's colours do not switch at once
        WebDriverWait(browser, 10).until(lambda b, t=text: luminance(b, t, "color") > 0.6, text)
    browser.execute_script("localStorage.clear()")


def test_search_finds_a_page(browser: Chrome, address: str) -> None:
    visit(browser, address)
    browser.find_element(By.CSS_SELECTOR, "#quarto-search button, #quarto-search input").click()
    WebDriverWait(browser, 10).until(lambda b: b.switch_to.active_element.tag_name == "input")
    browser.switch_to.active_element.send_keys("low-rank")
    WebDriverWait(browser, 10).until(lambda b: b.find_elements(By.CSS_SELECTOR, "a.search-result, .aa-Panel a"))
