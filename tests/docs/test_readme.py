"""The documents do not lie: their Python runs, page by page, and their commands and make targets exist."""

from __future__ import annotations

import io
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from loramix.cli.app import build_app, main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    return [match["body"] for match in FENCE.finditer(document.read_text()) if match["language"] == language]


def shell_lines(document: Path) -> list[str]:
    """The commands of a document's shell blocks: continued lines joined, comments and redirections cut off."""
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("|")[-1].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def loramix_commands() -> list[str]:
    return [line for document in DOCUMENTS for line in shell_lines(document) if line.startswith("loramix ")]


def make_targets() -> list[str]:
    return [
        target
        for document in DOCUMENTS
        for line in shell_lines(document)
        if line.startswith("make ")
        for target in shlex.split(line, comments=True)[1:]
        if "=" not in target
    ]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")], ids=lambda path: path.name)
def test_python_blocks_run_in_order(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__readme__"}
    for number, block in enumerate(blocks(document, "python")):
        exec(compile(block, f"{document.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("line", loramix_commands())
def test_loramix_commands_parse(line: str) -> None:
    group = get_command(build_app())
    _, name, *arguments = shlex.split(line, comments=True)
    if name == "--version":
        return
    command = group.commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)


@pytest.mark.parametrize("target", sorted(set(make_targets())))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_readme_shows_the_two_commands_and_runs_python() -> None:
    readme = ROOT / "README.md"
    assert {"demo", "test"} <= set(make_targets())
    assert loramix_commands()
    assert blocks(readme, "python")


def test_the_figures_are_those_of_the_benchmarks() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_speed.py"))
    assert script["BEGIN"] + script["section"]() + script["END"] in (ROOT / "docs" / "speed.md").read_text(), (
        "run `make docs`"
    )


def test_the_figures_of_routers_are_those_of_the_benchmarks() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_routers.py"))
    assert script["page"]() == (ROOT / "docs" / "routers.md").read_text(), "run `make docs`"


def test_the_readme_shows_what_the_demo_printed_and_drew() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_demo.py"))
    _, found, rest = (ROOT / "README.md").read_text().partition(script["BEGIN"])
    section, ending, _ = rest.partition(script["END"])
    assert found
    assert ending
    for stage in ("1. Build", "2. Train", "3. Save, and load", "4. Compare"):
        assert stage in section
    assert section.count("X-LoRA") >= 3
    for picture in ("docs/demo.svg", "docs/routing.png"):
        assert f"]({picture})" in section


@pytest.mark.parametrize("line", [line for line in loramix_commands() if line.startswith("loramix generate demo ")])
def test_commands_with_the_mixture_that_ships_run(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("2 + 2 ="))
    with pytest.raises(SystemExit) as stop:
        main([*shlex.split(line, comments=True)[1:], "--max-new-tokens", "2"])
    assert not stop.value.code
    assert capsys.readouterr().out
