"""A cache of the scaling pass: its last hidden states by text, in memory or on disk, for later epochs.

While the base model is frozen and nothing in the pass is random, they depend on the tokens alone. A text is stored
without its padding, so that it is found again in another batch: the hidden states are identical for an identical batch,
and within float32 rounding for another.

B, S: batch, sequence. H: hidden size. N: tokens.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.experts.base_model import text_config
from loramix.layers.layer import XLoraLayer
from loramix.layers.stack import ExpertStack
from loramix.model.build import XLoraModel
from loramix.passes.hooks import EXPERT_IDS, RoutingHook
from loramix.passes.state import attach, state_of
from loramix.training.stores import FileStore, MemoryStore

_BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_WITHOUT_EFFECT = frozenset({"labels", "use_cache", "return_dict", "num_items_in_batch", EXPERT_IDS, "cache_position"})
_WITHOUT_EFFECT_PREFIX = "output_"


def required_bytes(model: XLoraModel, tokens: int) -> int:
    """The bytes that the hidden states of `tokens` tokens take: N · H numbers of the base model's dtype.

    Args:
        model: the mixture.
        tokens: the number of tokens in the data, without padding.
    """
    return tokens * model.active_peft_config.hidden_size * model.dtype.itemsize


class ScalingPassCache(RoutingHook):
    """Caches the scaling pass's last hidden states of the texts that a model reads.

        with ScalingPassCache(model, max_bytes=2**30) as cache:
            trainer.train()

    Args:
        model: the mixture, frozen except its router (and its experts, if the scaling pass does not use them).
        max_bytes: the most bytes that the hidden states may take; further texts are not cached. `required_bytes` tells
            how many all of them take.
        folder: where to keep them in a file, which is deleted with the cache; None keeps them in memory.

    Attributes:
        bytes: the bytes that the cached hidden states take.
        hits: the number of forwards whose texts were all cached.
        misses: the number of the others.

    Raises:
        UnsupportedOperationError: a scaling pass that is random, or that the training changes.
        ConfigurationError: no room for a single token.
    """

    def __init__(self, model: XLoraModel, *, max_bytes: int, folder: str | PathLike[str] | None = None) -> None:
        self.model = model
        self._config = model.active_peft_config
        if max_bytes < required_bytes(model, 1):
            raise ConfigurationError(
                "The cache of the scaling pass has room for some tokens.",
                received=f"max_bytes={max_bytes}; one token takes {required_bytes(model, 1)}",
                remedy="Use required_bytes(model, tokens) bytes.",
            )
        refuse_changing_pass(model)
        self.max_bytes = max_bytes
        self.bytes = self.hits = self.misses = 0
        self._store: MemoryStore | FileStore = MemoryStore() if folder is None else FileStore(Path(folder))
        self._told = False
        self._settings = self._current_settings()
        self._detach: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._detach = attach(self.model, self)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Detach the cache from the model and drop what it holds."""
        if self._detach is not None:
            self._detach()
            self._detach = None
        self._store.close()

    def recall(self, inputs: Mapping[str, Any]) -> Tensor | None:
        if self._settings != self._current_settings():
            self._forget()  # what is cached is of another scaling pass
        rows = _rows(inputs)
        found = [hidden for row in rows or () if (hidden := self._store.read(row.key)) is not None]
        if rows is None or len(found) < len(rows):
            self.misses += 1
            return None
        self.hits += 1
        ids = inputs["input_ids"]
        together = found[0].new_zeros(*ids.shape, found[0].shape[1])
        for number, (row, hidden) in enumerate(zip(rows, found, strict=True)):
            together[number, row.start : row.stop] = hidden
        return together.to(ids.device)

    def keep(self, inputs: Mapping[str, Any], hidden: Float[Tensor, "B S H"]) -> None:
        refuse_changing_pass(self.model)
        for number, row in enumerate(_rows(inputs) or ()):
            if row.key in self._store:
                continue
            part = hidden[number, row.start : row.stop].detach().cpu().contiguous()
            if self.bytes + part.nbytes > self.max_bytes or not self._store.write(row.key, part):
                self._tell()
                return
            self.bytes += part.nbytes

    def _forget(self) -> None:
        self._store.clear()
        self.bytes = 0
        self._settings = self._current_settings()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"The cache of the scaling pass, or its disk, is full with {self.bytes:,} bytes; the scaling pass runs "
                "again for further texts. required_bytes(model, tokens) tells what all of them take.",
                stacklevel=2,
            )

    def _current_settings(self) -> tuple[object, ...]:
        """The settings, beside the tokens, that the hidden states depend on."""
        config, kind = self._config, self.model.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.dtype
        return config.scaling_pass_value * config.global_scaling_weight, precision, str(config.elsewhere)


def refuse_changing_pass(model: XLoraModel) -> None:
    """Check that the scaling pass gives the same hidden states for the same tokens, and can be skipped.

    Raises:
        UnsupportedOperationError: a base model or experts that train, active dropout, sharded parameters, an encoder
            and a decoder, or a router that needs no scaling pass.
    """
    if not state_of(model).needs_scaling_pass:
        raise UnsupportedOperationError(
            "The scaling pass can be cached where there is one.",
            received=f"router={model.active_peft_config.router!r}, which needs none",
            remedy="Train without this cache.",
        )
    config = model.active_peft_config
    used = bool(config.scaling_pass_value) or bool(config.elsewhere)  # given scalings are those of both passes
    experts = {id(p) for m in model.modules() if isinstance(m, XLoraLayer) for p in m.stacks.parameters()}
    router = {id(parameter) for parameter in model.router.parameters()}
    reason = None
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in router:
            continue
        if id(parameter) not in experts:
            reason = f"the base model's {name} is trained"
        elif used:
            values = f"scaling_pass_value={config.scaling_pass_value}, elsewhere={config.elsewhere}"
            reason = f"the scaling pass uses experts that are trained: {values}"
    if state_of(model).has_encoder:
        reason = "a decoder, whose hidden states depend on the encoder's text too"
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        reason = "parameters that are divided among processes (FSDP2), which must all take part in every pass"
    reason = reason or _dropout(model, experts_count=used)
    if reason is not None:
        raise UnsupportedOperationError(
            "The scaling pass can be cached where it may be skipped and gives the same hidden states again.",
            received=reason,
            remedy="Train without this cache; or freeze the base model, set its dropout to 0, and use DDP.",
        )


def _dropout(model: XLoraModel, *, experts_count: bool) -> str | None:
    noise = getattr(model.get_input_embeddings(), "neftune_noise_alpha", None)
    if noise:
        return f"noise is added to the embeddings: neftune_noise_alpha={noise}"
    settings = text_config(model.config).to_dict()
    for name, value in settings.items():  # many models apply dropout as a function, without a module
        elsewhere = name.startswith(("classifier", "summary"))  # heads of other tasks
        if "drop" in name and not elsewhere and isinstance(value, float) and value > 0:
            return f"the base model's configuration has {name}={value}"
    router = set(model.router.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and module.p > 0 and module not in router:
            return f"the base model's {name} drops with p={module.p}"
        if experts_count and isinstance(module, ExpertStack) and any(module.dropouts):
            return f"the experts at {name.partition('.stacks.')[0]} drop with p={max(module.dropouts)}"
    return None


@dataclass(frozen=True)
class _Row:
    key: bytes
    start: int
    stop: int


def _rows(inputs: Mapping[str, Any]) -> list[_Row] | None:
    """The key and the place of each text of a batch; None where the hidden states depend on other inputs too."""
    ids = inputs.get("input_ids")
    others = [
        name
        for name, value in inputs.items()
        if value is not None
        and name not in _BY_TOKEN
        and name not in _WITHOUT_EFFECT
        and not name.startswith(_WITHOUT_EFFECT_PREFIX)
    ]
    if not isinstance(ids, Tensor) or others:
        return None
    columns: dict[str, Tensor] = {}
    for name in _BY_TOKEN:
        value = inputs.get(name)
        if isinstance(value, Tensor):
            if value.dim() != 2 or value.shape[1] != ids.shape[1]:
                return None
            columns[name] = value.expand(ids.shape).cpu()
    mask = columns.pop("attention_mask", None)
    return [_row(columns, number, None if mask is None else mask[number]) for number in range(len(ids))]


def _row(columns: Mapping[str, Tensor], number: int, mask: Tensor | None) -> _Row:
    length = columns["input_ids"].shape[1]
    real = torch.arange(length) if mask is None else mask.nonzero().flatten()
    start, stop = (int(real[0]), int(real[-1]) + 1) if len(real) else (0, 0)
    digest = hashlib.sha256(f"{start} {stop}".encode())  # absolute positions depend on where a text begins
    for name, values in columns.items():
        digest.update(name.encode() + values[number, start:stop].contiguous().numpy().tobytes())
    if mask is not None and stop - start != len(real):
        digest.update(mask[start:stop].contiguous().numpy().tobytes())
    return _Row(digest.digest(), start, stop)
