"""The model card, README.md of a folder: what is saved there, for the Hub and for its readers.

A card that exists keeps its text. Of its header only the fields below change, and of its text only the sections between
markers of ours; a section that is not given anew stays as it is.

Source: huggingface_hub's `RepoCard`, and the Hub's specification of the header (hub-docs, `modelcard.md`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from loramix.config.base import TaskType
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, CorruptCheckpointError, SaveError
from loramix.experts.adapter import Adapter
from loramix.files.atomic import Writer, finish_interrupted, save_files, text_writer
from loramix.files.hub import HUB, base_repository_of, repository_of
from loramix.formats.describe import Description, ExpertDescription, RouterDescription, describe_content
from loramix.formats.mixture import MixtureCheckpoint
from loramix.routers.gating import gating_of

CARD_NAME, PICTURE_NAME = "README.md", "routing.png"
PICTURE_METADATA = {"Software": "loramix"}
"""The text in a picture of ours, by which it is known."""
_DESCRIPTION, _EVALUATION, _ROUTING = "description", "evaluation", "routing"
_MIXTURE_ROW, _ORACLE_ROW = "X-LoRA", "oracle"  # as `loramix.evaluation` calls them
_METRICS = ("perplexity", "bits_per_byte")
_PIPELINES = {TaskType.CAUSAL_LM.value: "text-generation", TaskType.SEQ_CLS.value: "text-classification"}


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        content: the mixture or the expert.
        base_class: name of the base model's class.
        repository: the id of the repository on the Hub that the folder is for; None if there is none so far.
        tags: tags beside our own.
        evaluation: the figures of an evaluation of the mixture, as `loramix eval --json` prints them.
        picture: a picture of its routing, as PNG with `PICTURE_METADATA`.
    """

    content: Adapter | MixtureCheckpoint
    base_class: str
    repository: str | None = None
    tags: Sequence[str] = ()
    evaluation: Mapping[str, Any] | None = None
    picture: bytes | None = None


def save_card(folder: Path, card: Card) -> None:
    """Write the card, or bring the one that is there up to date; the picture goes beside it.

    Raises:
        ConfigurationError: an evaluation that is not one of this mixture.
        CorruptCheckpointError: a README.md whose header cannot be read.
        SaveError: the files could not be written, or a picture of that name is there that loramix did not write; the
            folder keeps what it held.
    """
    finish_interrupted(folder)
    found = _open(folder / CARD_NAME, card)
    writers: dict[str, Writer] = {}
    if card.picture is not None:
        if (folder / PICTURE_NAME).exists() and not _is_ours(folder / PICTURE_NAME):
            raise SaveError(
                f"The picture of a card is {PICTURE_NAME}, and replaces that of an earlier card only.",
                received=f"{str(folder / PICTURE_NAME)!r}, which loramix did not write",
                remedy="Move that file away, or leave routing= out.",
            )
        writers[PICTURE_NAME] = partial(_write_bytes, content=card.picture)
    description = describe_content(card.content)
    _put_fields(found.data, card, description)
    sections = {_DESCRIPTION: _description(card, description)}
    if card.evaluation is not None:
        rows = _rows(card.evaluation, description)
        sections[_EVALUATION] = _evaluation(rows)
        _put_figures(found.data, card, rows[_MIXTURE_ROW])
    if card.picture is not None:
        sections[_ROUTING] = f"## Routing\n\n![The weight of each expert]({PICTURE_NAME})"
    for name, section in sections.items():
        found.text = _with_section(found.text, name, section)
    save_files(folder, writers | {CARD_NAME: text_writer(str(found))})


def _open(path: Path, card: Card) -> Any:
    """The card that is there, or a new one."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    title = card.repository.rpartition("/")[2] if card.repository else _kind(card.content)
    try:
        text = path.read_bytes().decode("utf-8-sig") if path.exists() else f"\n# {title}\n"
        whole = text if REGEX_YAML_BLOCK.search(text) else f"---\n\n---\n{text}"
        ModelCard(whole)  # checks the results of evaluations, which it would change
        return RepoCard(whole)
    except Exception as error:  # PyYAML's errors have no class in common with the others
        raise CorruptCheckpointError(
            f"{CARD_NAME} is UTF-8, and its header, if it has one, is YAML as the Hub specifies it.",
            received=f"{str(path)!r}: {type(error).__name__}: {error}",
            remedy="Correct the file, or move it away.",
        ) from error


def _is_ours(picture: Path) -> bool:
    (text,) = PICTURE_METADATA.items()
    with picture.open("rb") as file:
        return "\0".join(text).encode() in file.read(1024)


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _kind(content: Adapter | MixtureCheckpoint) -> str:
    return "X-LoRA mixture" if isinstance(content, MixtureCheckpoint) else "LoRA expert"


def _put_fields(header: Any, card: Card, description: Description) -> None:
    """Our fields of the header. PEFT loads an expert alone, so the Hub shows PEFT's code for it."""
    alone, base = isinstance(card.content, Adapter), base_repository_of(description.base_model)
    own = ["lora", *([] if alone else ["xlora", "mixture-of-experts"]), "loramix", *card.tags]
    header["library_name"] = "peft" if alone else "loramix"
    if base is not None:
        header["base_model"], header["base_model_relation"] = base, "adapter"
    pipeline = _PIPELINES.get(description.task_type or "")
    if pipeline is not None and not header.get("pipeline_tag"):
        header["pipeline_tag"] = pipeline
    given = cast(object, header.get("tags", []))
    tags = cast("list[object]", given) if isinstance(given, list) else [given]
    header["tags"] = [*tags, *(tag for tag in dict.fromkeys(own) if tag not in tags)]


def _put_figures(header: Any, card: Card, figures: Mapping[str, Mapping[str, float]]) -> None:
    """The mixture's figures, in place of earlier ones on the same text; the results of others stay."""
    from huggingface_hub.repocard_data import EvalResult, eval_results_to_model_index

    name = (card.repository or _kind(card.content)).rpartition("/")[2]
    results = [
        EvalResult("text-generation", "text", group, metric, values[metric], dataset_config=group)
        for group, values in figures.items()
        for metric in _METRICS
    ]
    (index,) = eval_results_to_model_index(name, results)
    texts = [result["dataset"] for result in index["results"]]
    models: list[dict[str, Any]] = header.get("model-index", [])
    place = next((model for model in models if model["name"] == name), None)
    if place is None:
        header["model-index"] = [*models, index]
    else:
        others = [result for result in place.get("results") or [] if result["dataset"] not in texts]
        place["results"] = others + index["results"]


def _section(name: str) -> re.Pattern[str]:
    begin, end = _markers(name)
    return re.compile(f"{begin}(?:(?!{begin}).)*?{end}", re.DOTALL)


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- loramix: {name} -->", f"<!-- /loramix: {name} -->"


def _with_section(text: str, name: str, section: str) -> str:
    """A text with this section in place of an earlier one, or at the end."""
    begin, end = _markers(name)
    line = "\r\n" if "\r\n" in text else "\n"
    marked = f"{begin}\n\n{section}\n\n{end}".replace("\n", line)
    if _section(name).search(text):
        return _section(name).sub(lambda _: marked, text, count=1)
    gap = "" if text.endswith(2 * line) or not text else line if text.endswith(line) else 2 * line
    return f"{text}{gap}{marked}{line}"


def _description(card: Card, description: Description) -> str:
    alone, base = description.router is None, base_repository_of(description.base_model)
    known = f"[{base}]({HUB}/{base})" if base else "A model without an id on the Hub"
    what = "One LoRA expert" if alone else f"An X-LoRA mixture of {description.num_experts} LoRA experts"
    return "\n".join(
        [
            f"{what}, saved by loramix.",
            "",
            "## Base model",
            "",
            f"{known}, of the class `{card.base_class}`. Adapted layers: {description.num_layers}.",
            "",
            "## Expert" if alone else "## Experts",
            "",
            *_experts(description.experts),
            *([] if description.router is None else ["", "## Router", "", *_router(card.content, description.router)]),
            "",
            "## Load",
            "",
            *_code(card, base),
        ]
    )


def _experts(experts: Iterable[ExpertDescription]) -> list[str]:
    """A table, whose sources are repositories on the Hub: a folder means nothing to readers of a card."""
    experts = list(experts)
    columns = ["expert", "rank", "alpha", "target modules", "modules", "parameters"]
    rows = [
        [
            _cell(expert.name),
            ", ".join(map(str, expert.ranks)),
            f"{expert.alpha:g}" + "".join(f", {variant}" for variant in expert.variants),
            _cell(", ".join(expert.targets)),
            str(expert.modules),
            f"{expert.parameters:,}",
        ]
        for expert in experts
    ]
    sources = [repository_of(expert.source) for expert in experts]
    if any(sources):
        columns.append("source")
        for row, expert, source in zip(rows, experts, sources, strict=True):
            row.append(f"[{_cell(expert.source)}]({HUB}/{source})" if source else "")
    return _table(columns, rows)


def _router(content: Adapter | MixtureCheckpoint, router: RouterDescription) -> list[str]:
    config = cast(XLoraConfig, content.config)
    sizes = {**router.settings, **({"width": config.xlora_size} if config.xlora_depth > 1 else {})}
    settings = "".join(f", {name.replace('_', ' ')} {value}" for name, value in sizes.items())
    scope = "each adapted layer has its own" if router.layerwise else "all adapted layers share them"
    lines = [
        f"- Kind: {_cell(router.kind)}, {router.parameters:,} parameters{_cell(settings)}",
        f"- Scalings: {scope}",
        f"- Gating: {_gating(config)}",
    ]
    if config.global_scaling_weight != 1:
        lines.append(f"- Weight of all experts: {config.global_scaling_weight:g}")
    if config.elsewhere:
        lines.append(f"- Given scalings, not the router's: {_cell(', '.join(config.elsewhere))}")
    return lines


def _gating(config: XLoraConfig) -> str:
    gating = gating_of(config)
    steps = [f"softmax with temperature {gating.temperature:g}" if gating.softmax else "no softmax over all experts"]
    steps.append("all experts" if gating.top_k is None else f"the best {gating.top_k} of each token")
    if gating.renormalise:
        steps.append("softmax over these")
    own = "".join(f", {name} {value}" for name, value in config.gating_settings.items())
    return ("" if config.gating == "xlora" else f"{_cell(config.gating + own)}; ") + "; ".join(steps)


def _code(card: Card, base: str | None) -> list[str]:
    """How to load it; of a class that is not transformers' own, the base model needs its own code."""
    import transformers

    own = card.base_class in dir(transformers)
    kind = card.base_class if own else "AutoModelForCausalLM"
    revision = card.content.config.revision
    arguments = [
        f'"{base or "path/to/the/base-model"}"',
        *([f'revision="{revision}"'] if base and revision else []),
        *([] if own else ["trust_remote_code=True"]),
    ]
    place = f'"{card.repository}")' if card.repository else '".")  # this folder, or its id on the Hub'
    return [
        "```python",
        "from loramix import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({', '.join(arguments)})",
        f"model = PeftModel.from_pretrained(base, {place}",
        "```",
    ]


def _rows(evaluation: Mapping[str, Any], description: Description) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of an evaluation, by row and by group of text."""
    names = [expert.name for expert in description.experts]
    try:
        experts = list(evaluation["experts"])
        rows = {
            str(row): {
                str(group): {name: float(figures[name]) for name in _METRICS} for group, figures in groups.items()
            }
            for row, groups in evaluation["rows"].items()
        }
        found = {tuple(groups) for groups in rows.values()}
    except (LookupError, TypeError, ValueError, AttributeError):
        experts, rows, found = None, {}, set[tuple[str, ...]]()
    if experts != names or _MIXTURE_ROW not in rows or len(found) != 1:
        raise ConfigurationError(
            "The evaluation in a card is one of the mixture that it describes.",
            received="no evaluation" if experts is None else f"an evaluation of {experts} for {names}",
            remedy="pass what loramix.evaluation.evaluate(model, …) returns, or what `loramix eval --json` printed",
        )
    return rows


def _evaluation(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    groups = list(rows[_MIXTURE_ROW])
    values = {row: [figures[group]["bits_per_byte"] for group in groups] for row, figures in rows.items()}
    measured = [v for row, v in values.items() if row != _ORACLE_ROW]
    best = [min(column) for column in zip(*measured, strict=True)]
    table = [
        [
            _cell(row),
            *(f"**{x:.3f}**" if x == y and row != _ORACLE_ROW else f"{x:.3f}" for x, y in zip(v, best, strict=True)),
        ]
        for row, v in values.items()
    ]
    return "\n".join(
        [
            "## Evaluation",
            "",
            "Bits per byte of text, by group: lower is better, and the best is bold. "
            f"{_MIXTURE_ROW} is this mixture; the {_ORACLE_ROW} takes the best expert of each group.",
            "",
            *_table(["", *map(_cell, groups)], table),
        ]
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def _cell(text: str) -> str:
    """A text of one line, in which nothing means anything to Markdown."""
    return re.sub(r"([\\`*|\[\]])", r"\\\1", html.escape(" ".join(text.split()), quote=False))
