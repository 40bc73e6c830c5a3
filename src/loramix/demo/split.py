"""Which text is held out: by a stable hash of where it comes from, and never by two runs of words that are equal."""

from __future__ import annotations

import hashlib

SHARED_WORDS = 12
"""A training paragraph with this many words in a row from held-out text is left out."""


def stable_hash(key: str) -> int:
    """The same number on every platform and Python version."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def is_held_out(key: str) -> bool:
    """Whether the document of this key is for evaluation: one key in eight."""
    return stable_hash(key) % 8 == 0


def module_key(name: str) -> str:
    """`datetime` for `datetime.py`, `_pydatetime.py` and `datetime/`: versions and parts of one module."""
    stem = name.removesuffix(".py")
    for prefix in ("_py_", "_py", "_"):
        stem = stem.removeprefix(prefix)
    return stem or name


def word_runs(text: str) -> set[int]:
    """Hashes of every run of `SHARED_WORDS` words of the text, whatever the line breaks between them."""
    words = text.split()
    return {hash(tuple(words[i : i + SHARED_WORDS])) for i in range(len(words) - SHARED_WORDS + 1)}
