"""For `loramix generate` and others: load a mixture with its tokenizer, and continue a text.

T: tokens of prompt and continuation together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    TextStreamer,
    set_seed,
)
from transformers.utils import logging

from loramix import demo
from loramix.analysis.show.live import RoutingStreamer, WrittenToken, stream_routing
from loramix.cli.shipped import is_shipped
from loramix.config.xlora import XLoraConfig
from loramix.errors import (
    ConfigurationError,
    UnsupportedOperationError,
)
from loramix.evaluation.passages import pad
from loramix.files.base_models import load_base, load_tokenizer, one_line
from loramix.files.location import Location
from loramix.formats.load import read_config
from loramix.model.build import PeftModel, XLoraModel
from loramix.model.prompt_choice import PromptChoice, Responses, Similarity
from loramix.training.initialise import prompt_texts
from loramix.training.settings import read_prompts

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sampling:
    """Sampling settings; None takes the base model's own."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class OpenModel:
    """A mixture or a single expert on its base model, with the tokenizer, and the names of both."""

    model: PeftModel
    tokenizer: PreTrainedTokenizerFast
    mixture: str
    base: str

    def as_mixture(self, rule: str) -> XLoraModel:
        """The model, for a command that needs a mixture.

        Raises:
            ConfigurationError: a single expert; `rule` says why it is not enough.
        """
        if not isinstance(self.model, XLoraModel):
            raise ConfigurationError(
                rule, received=f"the single expert {self.mixture!r}", remedy="name the folder of a mixture"
            )
        return self.model


@dataclass(frozen=True)
class Continuation:
    """A prompt and its continuation: `ids` (1, T), of which the first `prompt_tokens` are the prompt's.

    `tokens` are the generated tokens with their routing, if it was asked for.
    """

    opened: OpenModel
    prompt: str
    ids: Tensor
    prompt_tokens: int
    tokens: list[WrittenToken] | None = None

    @property
    def text(self) -> str:
        """The text after the prompt."""
        return cast(str, self.opened.tokenizer.decode(self.ids[0, self.prompt_tokens :], skip_special_tokens=True))

    def document(self) -> dict[str, Any]:
        """The same as JSON's types; with a routing, also the weight of each expert in each generated token."""
        document: dict[str, Any] = {
            "mixture": self.opened.mixture,
            "base": self.opened.base,
            "prompt": self.prompt,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.ids.shape[1] - self.prompt_tokens,
        }
        if self.tokens is not None:
            document["experts"] = self.opened.model.expert_names
            document["tokens"] = [token._asdict() for token in self.tokens]
        return document


def open_mixture(
    mixture: str, *, base: str | None = None, device: str = "auto", routed: str | None = None
) -> OpenModel:
    """Load a mixture, or a single expert, on its base model, ready to generate.

    Args:
        mixture: a folder or a Hub id; "demo" is the mixture that ships with loramix.
        base: the base model, a folder or a Hub id; None takes the one that the mixture names.
        device: a torch device; "auto" chooses the accelerator if there is one.
        routed: the remedy in the error for a single expert, where the command needs a routing; None accepts one.

    Raises:
        ConfigurationError: the mixture names no base model and none is given, or the device cannot be used.
        UnsupportedOperationError: a single expert, where the command needs a routing.
        CheckpointNotFoundError, CorruptCheckpointError: as `load_base`.
        CheckpointError, AdapterError: as `PeftModel.from_pretrained`.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    place = _usable(device)
    if is_shipped(mixture) and base is None:
        model, tokenizer = demo.load()
        return OpenModel(_placed(model, place), tokenizer, mixture, mixture)
    saved = read_config(Location(mixture))
    if routed is not None and not isinstance(saved, XLoraConfig):
        raise UnsupportedOperationError(
            "Only a mixture has a routing to look at.", received=f"the single expert {mixture!r}", remedy=routed
        )
    identifier = base or saved.base_model_name_or_path
    if not identifier:
        raise ConfigurationError(
            "A mixture names its base model, or the command does.",
            received=f"no base_model_name_or_path in {mixture!r}",
            remedy="add --base FOLDER_OR_HUB_ID",
        )
    revision = None if base else saved.revision
    tokenizer, plain = load_tokenizer(identifier, revision), load_base(identifier, revision)
    return OpenModel(_placed(PeftModel.from_pretrained(plain, mixture), place), tokenizer, mixture, identifier)


def continue_text(
    opened: OpenModel,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling | None,
    *,
    stream: bool,
    show_experts: bool = False,
) -> Continuation:
    """Continue a prompt, greedily or by sampling.

    Args:
        opened: the mixture.
        prompt: the text to continue; at least one token.
        max_new_tokens: the most tokens to generate.
        sampling: None takes the most likely token at each step.
        stream: print the text to stdout while it is generated.
        show_experts: keep the routing of each token, and print it in the colour of its leading expert.

    Raises:
        ConfigurationError: the prompt has no tokens.
        UnsupportedOperationError: the routing of a single expert.
    """
    tokenizer = opened.tokenizer
    encoded = tokenizer(prompt, return_tensors="pt").to(opened.model.device)
    ids = encoded["input_ids"]
    if ids.shape[1] == 0:
        raise ConfigurationError(
            "A prompt has at least one token.", received=repr(prompt), remedy="pass a text with --prompt"
        )
    model = opened.model
    with ExitStack() as stack:
        streamer = None
        if show_experts:
            streamer = stack.enter_context(stream_routing(model, tokenizer, Console(highlight=False, quiet=not stream)))
        elif stream:
            streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        written = model.generate(
            **encoded, max_new_tokens=max_new_tokens, streamer=streamer, **_choices(sampling), **_padding(tokenizer)
        )
    tokens = streamer.tokens if isinstance(streamer, RoutingStreamer) else None
    return Continuation(opened, prompt, _row(written), ids.shape[1], tokens)


def fix_by_prompt(opened: OpenModel, prompt: str, by: str) -> dict[str, float]:
    """Fix a mixture's routing by a prompt.

    Args:
        opened: the mixture.
        prompt: the text.
        by: "mean", "responses", or a JSON file of expert name -> example texts.

    Returns:
        The weight of each expert; of layers with their own, the mean.

    Raises:
        ConfigurationError: a single expert, a prompt without tokens, or a file that is none of example texts.
        DataError: a file without texts of each expert.
    """
    model = opened.as_mixture("Weights of experts are chosen in a mixture.")
    choice: PromptChoice | None = None
    if by == "responses":
        choice = Responses()
    elif by != "mean":
        texts = prompt_texts(read_prompts(by), model.expert_names)
        choice = Similarity.to(model, {name: _batch(opened, found) for name, found in texts.items()})
    model.fix_routing(prompt=_batch(opened, [prompt]), by=choice)
    assert model.fixed_routing is not None
    return dict(zip(model.expert_names, model.fixed_routing.mean(0).tolist(), strict=True))


def _batch(opened: OpenModel, texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = [opened.tokenizer(text)["input_ids"] for text in texts]
    if not all(encoded):
        raise ConfigurationError(
            "A prompt has at least one token.", received=repr(texts), remedy="pass a text with --prompt"
        )
    ids, real = pad(encoded)
    return {"input_ids": ids, "attention_mask": real}


def _usable(device: str) -> torch.device:
    if device == "auto":
        return (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None) or _CPU
    try:
        place = torch.device(device)
        torch.zeros(1, device=place).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigurationError(
            "A device is one that torch can use on this machine.",
            received=f"{device!r}: {one_line(error)}",
            remedy='use --device cpu, or leave --device out: "auto" is the accelerator where there is one',
        ) from error
    return place


def _placed(model: PeftModel, device: torch.device) -> PeftModel:
    nn.Module.to(model.eval(), device)
    return model


def _choices(sampling: Sampling | None) -> dict[str, Any]:
    if sampling is None:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.seed is not None:
        set_seed(sampling.seed)
    given = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return {"do_sample": True} | {name: value for name, value in given.items() if value is not None}


def _padding(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {} if tokenizer.pad_token_id is not None else {"pad_token_id": tokenizer.eos_token_id}


def _row(written: Int[Tensor, "1 T"]) -> Int[Tensor, "1 T"]:
    return written.detach().cpu()
