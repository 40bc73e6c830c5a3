"""Text from any Python installation: one list of sources for each domain.

A source names a document and reads it on demand. Its key decides the side of the split: versions and parts of one
module (`datetime.py` and `_pydatetime.py`, the files of a package) share a key.
"""

from __future__ import annotations

import ast
import html.entities
import importlib
import json
import os
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import cast

from loramix.demo.arithmetic import worked_problems
from loramix.demo.split import module_key
from loramix.errors import LoramixError

_NOT_LIBRARY = {
    *("site-packages", "dist-packages", "lib-dynload", "ensurepip"),
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "distutils"),
    *("pydoc_data", "encodings", "__phello__", "__hello__.py", "this.py", "antigravity.py"),
}
"""Tests, tables, generated and installed files: not the library's own code."""

_ALGORITHMIC = ("CJK ", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "VARIATION SELECTOR")
"""Beginnings of Unicode names that only number their characters."""

_MATH_SEEDS = 6400
_LEAST_CHARACTERS = 400


@dataclass(frozen=True)
class Source:
    """One document: its name, the key that decides its side of the split, and how to read it."""

    name: str
    key: str
    read: Callable[[], str]


def code() -> list[Source]:
    """Source files of the standard library without their docstrings."""
    return [Source(f"code {name}", key, partial(_code, path)) for name, key, path in _modules()]


def prose() -> list[Source]:
    """The language reference in `pydoc_data.topics`, and the docstrings of the standard library."""
    topics = [Source(f"topic {name}", f"topic {name}", partial(_strip, text)) for name, text in _topics().items()]
    return topics + [Source(f"docstrings {name}", key, partial(_docstrings, path)) for name, key, path in _modules()]


def math() -> list[Source]:
    """Worked arithmetic, a page for each seed."""
    return [Source(f"seed {seed}", f"seed {seed}", partial(worked_problems, seed)) for seed in range(_MATH_SEEDS)]


def tables() -> list[Source]:
    """Records as CSV, JSON lines and markup: the Unicode character database, HTML entities, HTTP status codes."""
    entities = sorted(html.entities.name2codepoint.items())
    found = [Source("http", "http", _status_codes)]
    found += [_table("entities", i, partial(_entities, entities[i : i + 64])) for i in range(0, len(entities), 64)]
    return found + [_table("unicode", block, partial(_unicode_block, block)) for block in range(0, 0x20000, 128)]


def _standard_library() -> Path:
    path = Path(sysconfig.get_path("stdlib"))
    if not (path / "argparse.py").is_file():
        raise LoramixError(
            "The demo reads its text from the source files of Python's standard library.",
            received=f"no .py files in {path} (a zipped or stripped installation)",
            remedy="run the demo with a full CPython 3.11 or newer, from python.org or your system's packages",
        )
    return path


def _topics() -> dict[str, str]:
    try:
        return cast("dict[str, str]", importlib.import_module("pydoc_data.topics").topics)
    except ImportError as error:
        raise LoramixError(
            "The demo reads its prose from `pydoc_data.topics` of Python's standard library.",
            received=str(error),
            remedy="run the demo with a full CPython 3.11 or newer, from python.org or your system's packages",
        ) from error


@cache
def _modules() -> list[tuple[str, str, Path]]:
    root = _standard_library()
    found: list[tuple[str, str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        for name in files:
            if name.endswith(".py") and name not in _NOT_LIBRARY and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                parts = path.relative_to(root).parts
                found.append(("/".join(parts), module_key(parts[0]), path))
    return sorted(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _strip(text: str) -> str:
    return text.strip() + "\n"


def _docstring_nodes(source: str) -> list[ast.Constant]:
    """The docstrings of a source text in their order; none if this Python version cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    scopes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    first = [scope.body[0] for scope in scopes if scope.body]
    values = [node.value for node in first if isinstance(node, ast.Expr)]
    found = [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return sorted(found, key=lambda node: node.lineno)


def _code(path: Path) -> str:
    source = _read(path)
    nodes = _docstring_nodes(source)
    gone = {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = [line.rstrip() for number, line in enumerate(source.splitlines(), 1) if number not in gone]
    text = "\n".join(lines).strip("\n") + "\n"
    return text if len(text) >= _LEAST_CHARACTERS else ""


def _docstrings(path: Path) -> str:
    """The paragraphs of a module's longer docstrings, without interpreter sessions, which are code."""
    texts = [_dedent(cast("str", node.value)) for node in _docstring_nodes(_read(path))]
    paragraphs = [p for text in texts if len(text) >= 160 for p in text.split("\n\n") if ">>>" not in p and p.strip()]
    text = "\n\n".join(paragraphs) + "\n"
    return text if len(text) >= _LEAST_CHARACTERS else ""


def _dedent(docstring: str) -> str:
    lines = docstring.expandtabs().splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(indents, default=0)
    return "\n".join([line.strip() for line in lines[:1]] + [line[margin:].rstrip() for line in lines[1:]]).strip()


def _table(kind: str, number: int, read: Callable[[], str]) -> Source:
    return Source(f"{kind} {number:05X}", f"{kind} {number:05X}", read)


def _status_codes() -> str:
    return "status,name,reason\n" + "".join(f"{s.value},{s.name},{s.phrase}\n" for s in HTTPStatus)


def _entities(rows: list[tuple[str, int]]) -> str:
    return "entity\tcode point\n" + "".join(f"&{name};\tU+{point:04X}\n" for name, point in rows)


def _unicode_block(block: int) -> str:
    """The records of up to 128 characters in one of three notations; "" for a block without names of its own."""
    characters = [c for c in map(chr, range(block, block + 128)) if _has_own_name(c)]
    rows = [
        (f"{ord(c):04X}", unicodedata.name(c), unicodedata.category(c), unicodedata.bidirectional(c))
        for c in characters
    ]
    if len(rows) < 16:
        return ""
    if block // 128 % 3 == 0:
        return "code,name,category,direction\n" + "".join(f"{','.join(row)}\n" for row in rows)
    if block // 128 % 3 == 1:
        return "".join(json.dumps({"code": p, "name": n, "category": c, "direction": d}) + "\n" for p, n, c, d in rows)
    return "".join(f'<char code="{p}" name="{n}" category="{c}" direction="{d}"/>\n' for p, n, c, d in rows)


def _has_own_name(character: str) -> bool:
    name = unicodedata.name(character, "")
    return bool(name) and not name.startswith(_ALGORITHMIC)
