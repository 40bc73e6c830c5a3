"""The documentation site builds without a warning, loads nothing from elsewhere, and its search works from a disk."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from loramix import __all__ as public_names

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOADING = {
    "audio": ("src",), "embed": ("src",), "iframe": ("src",), "img": ("src", "srcset"), "input": ("src",),
    "link": ("href",), "object": ("data",), "script": ("src",), "source": ("src", "srcset"), "video": ("src", "poster"),
}  # fmt: skip
ELSEWHERE = re.compile(r"(?:https?:)?//", re.IGNORECASE)
STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?\s*((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


class Resources(HTMLParser):
    """What a page loads: the values of attributes that make a browser load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.classes |= set((values.get("class") or "").split())
        if tag != "link" or values.get("rel") != "canonical":
            self.found += [values[name] or "" for name in LOADING.get(tag, ()) if name in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site is built with the extra `docs`")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""
    return folder


def test_every_document_is_a_page(site: Path) -> None:
    pages = {path.stem for path in site.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    assert {"index", "changelog", "contributing", "security"} <= pages


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    reference = (site / "api" / "loramix.html").read_text(encoding="utf-8")
    assert [n for n in public_names if f'id="loramix.{n}"' not in reference and not n.startswith("__")] == []


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    outside = {}
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        resources = Resources()
        resources.feed(text)
        outside[page.name] = [r for r in resources.found if ELSEWHERE.match(r)] + STYLE.findall(text)
        assert "mermaid" not in resources.classes, "the theme loads what draws these from a CDN"
    assert {name: found for name, found in outside.items() if found} == {}
    assert len(outside) > 10


def test_no_style_or_picture_loads_anything_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.css"), *site.rglob("*.svg")]
    assert files
    assert {path.name: found for path in files if (found := STYLE.findall(path.read_text(encoding="utf-8")))} == {}


def test_links_to_examples_lead_to_files(site: Path) -> None:
    names = re.findall(r'href="(examples/[^"#]+)"', (site / "examples.html").read_text(encoding="utf-8"))
    assert len(names) >= len(list((ROOT / "examples").glob("*.py")))
    assert [name for name in names if not (site / name).is_file()] == []
    assert ".md)" not in (site / "llms.txt").read_text(encoding="utf-8")


@pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None, reason="searching needs chromium and playwright"
)
def test_search_finds_pages_from_a_disk_and_asks_no_network(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        try:
            page = browser.new_page()
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.goto((site / "index.html").as_uri())
            page.locator("input.md-search__input").click()
            page.locator("input.md-search__input").press_sequentially("lockstep")
            page.locator(".md-search-result__item").first.wait_for(timeout=20_000)
            found = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
        finally:
            browser.close()
    assert any("generation.html" in link for link in found)
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
