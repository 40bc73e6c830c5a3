"""The split into training and held-out text: by a stable hash of the source, without shared runs of words."""

from __future__ import annotations

import hashlib
from collections.abc import Set as AbstractSet

SHARED_WORDS = 12
"""A training paragraph that shares a run of this many words with held-out text is left out."""


def stable_hash(key: str) -> int:
    """The same number on every platform and Python version."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def is_held_out(key: str) -> bool:
    """Whether the document with this key is held out: one key in eight."""
    return stable_hash(key) % 8 == 0


def module_key(name: str) -> str:
    """The key of a module: `datetime` for `datetime.py`, `_pydatetime.py` and `datetime/`."""
    stem = name.removesuffix(".py")
    for prefix in ("_py_", "_py", "_"):
        stem = stem.removeprefix(prefix)
    return stem or name


def word_runs(text: str) -> list[int]:
    """The hashes of all runs of `SHARED_WORDS` words of the text, in order, whatever the line breaks between them."""
    words = text.split()
    return [hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1)]


def without_runs(text: str, runs: AbstractSet[int]) -> str:
    """The text without the paragraphs that contain part of these runs, repeated until it holds none of them."""
    while True:
        paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
        owners = [number for number, paragraph in enumerate(paragraphs) for _ in paragraph.split()]
        touched = {
            owner
            for start, run in enumerate(word_runs(text))
            if run in runs
            for owner in owners[start : start + SHARED_WORDS]
        }
        if not touched:
            return text
        kept = [paragraph for number, paragraph in enumerate(paragraphs) if number not in touched]
        text = "\n\n".join(kept).rstrip("\n") + "\n" if kept else ""
