"""Four domains of text from any Python installation, split so that held-out text was never trained on.

A document's key (a standard-library module, a reference topic, a seed, a block of records) is hashed, and one key in
eight is held out, the same on every platform and version. The standard library repeats itself, so a training document
loses every paragraph that shares a run of words with held-out text.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from loramix.demo import sources
from loramix.demo.sources import Source
from loramix.demo.split import is_held_out, stable_hash, without_runs, word_runs

DOMAINS = ("code", "prose", "math", "tables")

_SOURCES: dict[str, Callable[[], list[Source]]] = {
    "code": sources.code,
    "prose": sources.prose,
    "math": sources.math,
    "tables": sources.tables,
}
_REPEATING = ("code", "prose")
"""Domains of written text. In the generated ones every line is built alike, and the split is exact by itself."""


def heldout_documents(domain: str) -> Iterator[tuple[str, str]]:
    """The evaluation documents `(name, text)` of a domain, in an order that mixes sources and never changes."""
    return _documents(_SOURCES[domain](), held_out=True)


def train_documents(domain: str) -> Iterator[tuple[str, str]]:
    """The training documents `(name, text)` of a domain, in an order that mixes sources and never changes."""
    documents = _documents(_SOURCES[domain](), held_out=False)
    return _without_repeats(documents) if domain in _REPEATING else documents


def train_text(domain: str, characters: int | None = None) -> list[str]:
    """Training texts of a domain, whole documents, about `characters` of them (default: all)."""
    return _until(characters, (text for _, text in train_documents(domain)))


def heldout_text(domain: str, characters: int | None = None) -> list[str]:
    """Held-out texts of a domain, whole documents, about `characters` of them (default: all)."""
    return _until(characters, (text for _, text in heldout_documents(domain)))


def mixed_heldout(characters: int) -> list[str]:
    """Held-out documents of all domains, about `characters` of each, the domains in turn."""
    columns = [heldout_text(domain, characters) for domain in DOMAINS]
    return [text for row in itertools.zip_longest(*columns) for text in row if text is not None]


def switching_pieces(
    count: int, *, held_out: bool, seed: int = 0, piece: int = 320, domains: int = 3
) -> list[list[tuple[str, str]]]:
    """`count` texts that switch domain within a sequence, each as its pieces `(domain, text)`.

    Args:
        count: how many texts.
        held_out: take the pieces from held-out documents, otherwise from training documents.
        seed: chooses the pieces.
        piece: characters of a piece, about, cut at the ends of lines.
        domains: how many domains a text has, each once, in random order.
    """
    rng = random.Random(seed)
    read = heldout_text if held_out else train_text
    pools = {domain: [text for text in read(domain, 150_000) if len(text) > 2 * piece] for domain in DOMAINS}
    found: list[list[tuple[str, str]]] = []
    for _ in range(count):
        chosen = rng.sample(DOMAINS, domains)
        found.append([(domain, _piece(rng.choice(pools[domain]), piece, rng) + "\n") for domain in chosen])
    return found


def _documents(found: list[Source], *, held_out: bool) -> Iterator[tuple[str, str]]:
    for source in sorted(found, key=lambda source: stable_hash(source.name)):
        if is_held_out(source.key) == held_out and (text := source.read()):
            yield source.name, text


def _without_repeats(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for name, text in documents:
        kept = without_runs(text, _heldout_runs())
        if kept:
            yield name, kept


@cache
def _heldout_runs() -> frozenset[int]:
    texts = (text for domain in _REPEATING for _, text in heldout_documents(domain))
    return frozenset(itertools.chain.from_iterable(map(word_runs, texts)))


def _until(characters: int | None, texts: Iterable[str]) -> list[str]:
    chosen: list[str] = []
    total = 0
    for text in texts:
        chosen.append(text)
        total += len(text)
        if characters is not None and total >= characters:
            break
    return chosen


def _piece(text: str, size: int, rng: random.Random) -> str:
    """Whole lines of the text, about `size` characters, from a random line on."""
    start = text.rfind("\n", 0, rng.randrange(max(1, len(text) - size))) + 1
    end = text.find("\n", min(start + size, len(text) - 1))
    return text[start : end if end >= 0 else len(text)][: 2 * size] + "\n"
