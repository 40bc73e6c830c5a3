"""Initial weights of a router: uniform, from example texts of each expert, or from labelled text.

What a kind of router makes of them it says itself (`Router.start_from`).

B, S: batch, sequence. F: features, the width of what the router reads. H: hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.errors import ConfigurationError, DataError, UnsupportedOperationError
from loramix.evaluation.losses import token_nats
from loramix.model.build import XLoraModel
from loramix.passes.hooks import EXPERT_IDS, RoutingHook
from loramix.passes.state import evaluating, observing, state_of
from loramix.passes.text_pass import embedded
from loramix.routers.linear import LinearRouter as LayerLinearRouter
from loramix.routers.norm import NormRouter
from loramix.routers.start import LinearRouter, Method, Moments
from loramix.training.data import read_text
from loramix.training.layer_start import (
    Calibration,
    LayerStart,
    calibrate,
    fit_labels,
    inputs_of,
    labelled_tokens,
    real_tokens,
)

Start = Method | Literal["random"]
"""How a router begins: in one of the ways of `init_router`, or as it was built."""

STARTS: dict[Start, str] = {
    "labels": "regression onto the experts that the training text names",
    "text": "regression onto the experts that predict some of the training text best",
    "prompts": "a linear discriminant of the prompts of each expert",
    "zeros": "every expert alike",
    "random": "as it was built",
}


def init_router(
    model: XLoraModel,
    method: Method,
    *,
    tokenizer: Any = None,
    prompts: Mapping[str, str | Path | Sequence[str]] | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
) -> LinearRouter | LayerStart | Calibration | None:
    """Set the weights of a mixture's router.

    Args:
        model: the mixture.
        method: "zeros": every expert gets the same scaling, for every token. "prompts": a linear discriminant of the
            means of what the router reads in a few texts for each expert. "labels": ridge regression onto the experts
            of labelled text, in closed form; for a static router their shares of it. "text": the same from text
            without labels, each row of which gets the expert that predicts it best; a norm router is calibrated on it.
        tokenizer: for "prompts": a transformers tokenizer.
        prompts: for "prompts": expert name -> a text, several, or the `Path` of a file with one; for every expert.
        batches: for "labels": `input_ids`, `attention_mask` and `expert_ids` (B,) or (B, S), -1 where unknown; for
            "text" without the last.

    Returns:
        The linear map that the router now computes; what a router of the layers was fitted to; None with "zeros".

    Raises:
        ConfigurationError: another method, arguments that do not belong to it, or a router without such a start.
        DataError: an expert without text, a name that is no expert's, or a file that cannot be read.
        UnsupportedOperationError: any but "zeros" for an encoder–decoder.
    """
    needed = {"zeros": (), "prompts": ("tokenizer", "prompts"), "text": ("batches",), "labels": ("batches",)}
    given = {"tokenizer": tokenizer, "prompts": prompts, "batches": batches}
    if method not in needed or {name for name, value in given.items() if value is not None} != set(needed[method]):
        raise ConfigurationError(
            'init_router takes "zeros", "prompts" with tokenizer= and prompts=, "labels" or "text" with batches=.',
            received=f"method={method!r} with {', '.join(n for n, v in given.items() if v is not None) or 'nothing'}",
            remedy='Call for example init_router(model, "prompts", tokenizer=tokenizer, prompts={"math": ["…"], …}).',
        )
    router, state = model.router, state_of(model)
    router.check_start(state.config, len(model.expert_names), method)
    if method == "zeros":
        router.start_uniform(state.gating)
        return None
    if state.has_encoder:
        raise UnsupportedOperationError(
            "A router is computed from texts where one backbone reads them.",
            received=f"method={method!r} for a {type(model).__name__}, whose encoder and decoder read a text each",
            remedy='Use method="zeros", and train the router.',
        )
    texts = (batches or ()) if prompts is None else _labelled(model, tokenizer, prompts)
    if isinstance(router, NormRouter):
        return calibrate(model, router, list(texts))
    if method == "text":
        texts = _by_likelihood(model, texts)
    if isinstance(router, LayerLinearRouter):
        return fit_labels(model, router, texts)
    return router.start_from(_moments(model, texts), "prompts" if method == "prompts" else "labels", state.gating)


class _Reader(RoutingHook):
    """Holds the scaling pass's last hidden states of one forward."""

    hidden: Tensor

    def keep(self, inputs: Mapping[str, Any], hidden: Tensor) -> None:
        self.hidden = hidden


@torch.no_grad()
def hidden_states(model: XLoraModel, batch: Mapping[str, Tensor]) -> Float[Tensor, "B S H"]:
    """The router's input: the scaling pass's last hidden states of a batch, in evaluation mode."""
    reader = _Reader()
    with observing(model, reader):
        model.base_model(**inputs_of(model, batch), use_cache=False)
    return reader.hidden


def _features(model: XLoraModel, batch: Mapping[str, Tensor]) -> list[Float[Tensor, "B S F"]]:
    """What the router reads of a batch: the hidden states, the input embeddings, or nothing.

    Raises:
        UnsupportedOperationError: it reads something else.
    """
    reads = model.router.reads
    if reads == "hidden state":
        return [hidden_states(model, batch)]
    if reads == "input embeddings":
        with torch.no_grad():
            return [embedded(model, inputs_of(model, batch)["input_ids"])]
    if reads == "nothing":
        return [torch.zeros(*batch["input_ids"].shape, 0)]
    raise UnsupportedOperationError(
        "A router is computed from labelled texts by their hidden states.",
        received=f"router={model.router.kind!r}, which reads the {reads}",
        remedy='use method="zeros", and train the router',
    )


def _by_likelihood(model: XLoraModel, batches: Iterable[Mapping[str, Tensor]]) -> Iterable[Mapping[str, Tensor]]:
    """The batches, each row with the expert under which it is likeliest: argmax_e Σ_t ln p_e(x_t | x_<t)."""
    names = model.expert_names
    for batch in batches:
        ids, real, inputs = batch["input_ids"], real_tokens(batch)[:, 1:], inputs_of(model, batch)
        nats = list[Tensor]()
        for chosen in names:
            with torch.no_grad(), evaluating(model), model.fixed_scalings([float(name == chosen) for name in names]):
                logits = model(**inputs, use_cache=False).logits.cpu()
            nats.append(token_nats(logits, ids.cpu()).masked_fill(~real.cpu(), 0.0).sum(1))
        yield {**batch, EXPERT_IDS: torch.stack(nats).argmin(0)}


def _moments(model: XLoraModel, batches: Iterable[Mapping[str, Tensor]]) -> list[Moments]:
    """The sums over the labelled tokens of what the router reads.

    Raises:
        DataError: an expert without a token.
    """
    names, found = model.expert_names, list[Moments]()
    for batch in batches:
        parts = [part.float().cpu() for part in _features(model, batch)]
        ids, known = labelled_tokens(batch, len(names))
        found = found or [Moments(part.shape[-1], len(names)) for part in parts]
        for moments, part in zip(found, parts, strict=True):
            moments.add(part[known], ids[known])
    counts = found[0].counts.tolist() if found else [0] * len(names)
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise DataError(
            "Every expert needs some text to make a router from.",
            received=f"no token for {', '.join(map(repr, empty))}",
            remedy="Give a few texts for each expert.",
        )
    return found


def _labelled(
    model: XLoraModel, tokenizer: Any, prompts: Mapping[str, str | Path | Sequence[str]]
) -> Iterable[Mapping[str, Tensor]]:
    texts = prompt_texts(prompts, model.expert_names)
    for number, name in enumerate(model.expert_names):
        for text in texts[name]:
            ids = tokenizer(text, return_tensors="pt", truncation=tokenizer.model_max_length < _NO_LIMIT)["input_ids"]
            yield {"input_ids": ids, EXPERT_IDS: torch.full((1,), number)}


def prompt_texts(prompts: Mapping[str, str | Path | Sequence[str]], names: Sequence[str]) -> dict[str, list[str]]:
    """Expert name -> texts, from texts and files.

    Raises:
        DataError: an expert without text, a name that is no expert's, or a file that cannot be read.
    """
    if set(prompts) != set(names):
        raise DataError(
            "prompts holds texts for each expert of the mixture, and for no other.",
            received=f"texts for {', '.join(map(repr, prompts)) or 'nobody'}; experts {', '.join(map(repr, names))}",
            remedy="Use the experts' names as keys.",
        )
    found: dict[str, list[str]] = {}
    for name in names:
        given = prompts[name]
        found[name] = [read_text(given)] if isinstance(given, Path) else [given] if isinstance(given, str) else [*given]
        if not found[name] or not all(text.strip() for text in found[name]):
            raise DataError(
                "Every expert has a text to make a router from, and none is blank.",
                received=f"{name!r}: {given!r}"[:200],
                remedy="Give a few texts for each expert.",
            )
    return found


_NO_LIMIT = 10**9
"""Tokenizers without a limit have a `model_max_length` far above this."""
