"""Every relative link of the documents leads to a file, and every anchor to a heading; no network is asked."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "llms.txt", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(?P<title>.+?) *$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:)(?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]+))?\)")


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
    return re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")


@cache
def anchors(document: Path) -> frozenset[str]:
    found: list[str] = []
    for match in HEADING.finditer(FENCE.sub("", document.read_text(encoding="utf-8"))):
        anchor = slug(match["title"])
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return frozenset(found)


def dead_links(document: Path, text: str) -> list[str]:
    dead = []
    for match in LINK.finditer(CODE.sub("", text)):
        target = document.parent / match["target"] if match["target"] else document
        lost = match["anchor"] and target.suffix == ".md" and match["anchor"] not in anchors(target)
        if not target.exists() or lost:
            dead.append(match[0])
    return dead


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert dead_links(document, document.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"(?<=[` ])(?:tests|docs|benchmarks|examples)/[\w./-]*\w", document.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "link", ["[a](no-such.md)", "[a](README.md#no-such)", "[a](#no-such)", "[![a](no-such.png)](README.md)"]
)
def test_a_dead_link_is_found(link: str) -> None:
    assert len(dead_links(ROOT / "README.md", link)) == 1


@pytest.mark.parametrize("title", ["2. The two passes", "`PeftModel`, and more", "5. Facts measured on PEFT 0.21.2"])
def test_anchors_are_those_of_the_site(title: str) -> None:
    slugs = pytest.importorskip("pymdownx.slugs")
    assert slugs.slugify(case="lower")(title.replace("`", ""), "-") == slug(title)


def test_the_sections_that_code_cites_exist() -> None:
    numbers = {match["title"].partition(".")[0] for match in HEADING.finditer((ROOT / "docs/semantics.md").read_text())}
    decisions = set(re.findall(r"^(\d+)\. \*\*", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py")))
    cited = re.findall(r"docs/semantics\.md §(\d+)", sources)
    named = re.findall(r"decisions? (\d+)(?: and (\d+))?", sources)
    assert cited
    assert set(cited) <= numbers
    assert named
    assert {number for pair in named for number in pair if number} <= decisions
