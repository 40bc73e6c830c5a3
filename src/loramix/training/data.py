"""Text to train on and to evaluate with: JSON lines, a folder of text files, or a data set of the Hub.

A JSON line holds `text`, or `messages` (a list of {"role", "content"}), or `prompt` and `completion`; and it may hold
`expert`, the name of the expert that the text belongs to. In a folder, the expert of what does not name one is the
subfolder it lies in, where one of the mixture's experts has that name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from loramix.errors import ConfigurationError, DataError
from loramix.passes.hooks import EXPERT_IDS
from loramix.training.losses import IGNORED

FORMATS = (("text",), ("messages",), ("prompt", "completion"))
EXPERT = "expert"


@dataclass(frozen=True)
class Row:
    """One text.

    Attributes:
        content: the fields of one of `FORMATS`.
        expert: the name of its expert, if the data has it.
        source: file and line, for messages.
    """

    content: dict[str, Any]
    expert: str | None
    source: str

    def as_text(self, tokenizer: Any) -> str:
        """The text as one string; a conversation through the tokenizer's chat template.

        Raises:
            DataError: a conversation, and a tokenizer without a chat template.
        """
        if "text" in self.content:
            return cast(str, self.content["text"])
        if "prompt" in self.content and isinstance(self.content["prompt"], str):
            return f"{self.content['prompt']}{self.content['completion']}"
        messages = self.content.get("messages") or [*self.content["prompt"], *self.content["completion"]]
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "A conversation needs a tokenizer with a chat template.",
                received=f"messages at {self.source}, and a tokenizer without one",
                remedy="Use the tokenizer of a chat model, set its chat_template, or give plain text.",
            )
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False))


def read_rows(
    place: str | Path, experts: Sequence[str] = (), *, split: str = "train", subset: str | None = None
) -> list[Row]:
    """Read all rows of a data set.

    Args:
        place: a `.jsonl` or `.json` file of JSON lines, a text file, a folder of text files, or the id of a data set
            on the Hub (through `datasets`, which caches it).
        experts: the experts that rows may name; empty allows any.
        split: the split of a data set on the Hub.
        subset: the subset of a data set on the Hub that has several.

    Raises:
        DataError: nothing there, a row that cannot be read, rows of different formats, or an expert that is none of
            the mixture's; with the file and the line.
    """
    path = Path(place).expanduser()
    if path.is_dir():
        rows = list(_from_folder(path, experts))
    elif path.is_file():
        rows = list(_from_lines(path) if path.suffix in (".jsonl", ".json") else _from_text(path, None))
    else:
        rows = list(_from_hub(str(place), subset, split))
    if not rows:
        raise DataError(
            "Data holds at least one text.",
            received=f"{str(place)!r}, which has none",
            remedy="Give JSON lines, a text file, or a folder with some.",
        )
    _check(rows, experts)
    return rows


def _from_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: JSON may hold U+2028 as it is
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(
                "Each line holds one JSON object.", received=f"{source}: {error}", remedy="Correct that line."
            ) from error
        yield _row(fields, source)


def _row(fields: object, source: str) -> Row:
    if not isinstance(fields, dict):
        raise DataError(
            "Each line holds one JSON object.",
            received=f"{source}: a {type(fields).__name__}",
            remedy='Write it as {"text": "…"}.',
        )
    values = cast("dict[str, Any]", fields)
    chosen = next((names for names in FORMATS if all(name in values for name in names)), None)
    if chosen is None:
        raise DataError(
            "Each row holds text, messages, or prompt and completion.",
            received=f"{source}: the columns {', '.join(values) or 'none'}",
            remedy='Name the column "text", or convert it to messages.',
        )
    content = {name: values[name] for name in chosen}
    wrong = [name for name, value in content.items() if not _is_text(value, name) and not _is_conversation(value, name)]
    if len({type(value) for value in content.values()}) > 1:
        wrong = list(content)
    expert = values.get(EXPERT)
    if not isinstance(expert, str | None):
        wrong.append(EXPERT)
    if wrong:
        shown = ", ".join(f"{name}={values.get(name)!r}"[:80] for name in wrong)
        raise DataError(
            "text is a string that is not blank, messages a list of {role, content}, prompt and completion both one "
            "or both the other, and expert is a name.",
            received=f"{source}: {shown}",
            remedy="Leave that row out, or correct it.",
        )
    return Row(content, expert, source)


def _is_text(value: object, name: str) -> bool:
    return name != "messages" and isinstance(value, str) and bool(value.strip())


def _is_conversation(value: object, name: str) -> bool:
    if name == "text" or not isinstance(value, list) or not value:
        return False
    messages = cast("list[object]", value)
    return all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages)


def _from_folder(path: Path, experts: Sequence[str]) -> Iterator[Row]:
    for file in sorted(path.rglob("*")):
        parts: tuple[str, ...] = file.relative_to(path).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        owner = next(iter(parts[:-1]), None)
        owner = owner if not experts or owner in experts else None
        if file.suffix in (".jsonl", ".json"):
            yield from (row if row.expert else replace(row, expert=owner) for row in _from_lines(file))
        else:
            yield from _from_text(file, owner)


def _from_text(path: Path, expert: str | None) -> Iterator[Row]:
    text = read_text(path)
    if text.strip():
        yield Row({"text": text}, expert, str(path))


def read_text(path: Path) -> str:
    """A file's text.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(
            "Data is a file that can be read.",
            received=f"{path}: {error.strerror or error}",
            remedy="Correct the path: it names one file.",
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            "Data is text in UTF-8.",
            received=f"{path}: {error}",
            remedy="Convert the file to UTF-8, or leave it out.",
        ) from error


def _from_hub(name: str, subset: str | None, split: str) -> Iterator[Row]:
    if name.startswith((".", "/", "~")) or "/" not in name:
        raise DataError(
            "Data is a file, a folder, or the id of a data set.",
            received=f"{name!r}, and {Path(name).expanduser().absolute()} does not exist",
            remedy="Correct the path, or give an id such as user/data.",
        )
    import datasets  # pyright: ignore[reportMissingTypeStubs]

    try:
        loaded = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises nearly anything, by where it looked
        raise DataError(
            "A data set is in the cache, or the Hub hands it out.",
            received=f"{name!r}, split {split!r}: {type(error).__name__}: {' '.join(str(error).split())}",
            remedy="Correct the id or the split, or give a local file.",
        ) from error
    for number, fields in enumerate(cast("Iterable[Mapping[str, Any]]", loaded)):
        yield _row(dict(fields), f"{name}, row {number}")


def _check(rows: Sequence[Row], experts: Sequence[str]) -> None:
    first = rows[0]
    for row in rows:
        if set(row.content) != set(first.content):
            raise DataError(
                "All rows are of one format.",
                received=f"{', '.join(first.content)} at {first.source}, {', '.join(row.content)} at {row.source}",
                remedy="Convert one of them, or train on them one after the other.",
            )
        if experts and row.expert is not None and row.expert not in experts:
            raise _unknown(f"{row.source}: expert {row.expert!r}", experts)


def _unknown(what: str, experts: Iterable[str]) -> DataError:
    return DataError(
        "A row names one of the mixture's experts, or none.",
        received=f"{what}; the experts are {', '.join(map(repr, experts))}",
        remedy="Rename the expert in the data or in the mixture, or leave the column out.",
    )


def check_expert_ids(ids: Tensor, experts: int) -> None:
    """Raises ConfigurationError: an id that is neither `IGNORED` nor the number of an expert."""
    wrong = ids[(ids != IGNORED) & ((ids < 0) | (ids >= experts))]
    if len(wrong):
        raise ConfigurationError(
            f"expert_ids are numbers of experts, or {IGNORED} where the expert is not known.",
            received=f"{int(wrong[0])} with {experts} experts",
            remedy=f"Number them from 0 to {experts - 1}, in the order of XLoraConfig.adapters.",
        )


class ExpertLabels:
    """A data collator around another one: the rows' `expert` becomes the batch's `expert_ids` (B,).

        SFTTrainer(…, data_collator=ExpertLabels(collator, names), args=SFTConfig(remove_unused_columns=False))

    Args:
        collator: makes a batch of rows without that column.
        experts: the mixture's experts, in order.
    """

    def __init__(self, collator: Any, experts: Sequence[str]) -> None:
        self.collator = collator
        self.experts = {name: number for number, name in enumerate(experts)}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch.

        Raises:
            DataError: an expert that is none of the mixture's.
        """
        names = [row.get(EXPERT) for row in rows]
        unknown = [name for name in names if name is not None and name not in self.experts]
        if unknown:
            raise _unknown(f"expert {unknown[0]!r}", self.experts)
        batch = self.collator([{name: value for name, value in row.items() if name != EXPERT} for row in rows])
        ids = [IGNORED if name is None else self.experts[name] for name in names]
        return {**batch, EXPERT_IDS: torch.tensor(ids)}
