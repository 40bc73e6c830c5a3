"""One LoRA expert in memory: its name, its configuration, and its matrices for each module.

r: the expert's rank in a module. in, out: the module's sizes. V, D: entries and width of an embedding. N: matrices in
one parameter of a mixture-of-experts block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self, TypeVar

from jaxtyping import Float
from torch import Tensor

from loramix.config.lora import LoraConfig
from loramix.config.wrappers import unwrapped
from loramix.errors import AdapterMismatchError, ConfigurationError, CorruptCheckpointError
from loramix.files.tensors import all_finite

_Value = TypeVar("_Value")

WRAPPED = ".base_layer"
"""What the path of a block has at its end in PEFT's files, once for each wrapper around the one that is meant."""

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows of an embedding that `trainable_token_indices` numbers; whole rows, in spite of the name."""


@dataclass
class LoraWeights:
    """An expert's tensors in one module, as PEFT stores them.

    Args:
        A: linear (r, in); embedding, `lora_embedding_A`, (r, V); convolution (r, in, kh, kw).
        B: linear (out, r); embedding, `lora_embedding_B`, (D, r); convolution (out, r, 1, 1).
        bias: of B, (out,), with `lora_bias=True`.
        magnitude: DoRA's, `lora_magnitude_vector`: (out,), for a convolution (1, out, 1, 1).
        embedding: whether A and B have an embedding's keys in the file.
    """

    A: Float[Tensor, "r n *kernel"]
    B: Float[Tensor, "out r *ones"]
    bias: Float[Tensor, " out"] | None = None
    magnitude: Float[Tensor, "*magnitude"] | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """r, from the shape of A."""
        return self.A.shape[0]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are not None."""
        return [tensor for tensor in (self.A, self.B, self.bias, self.magnitude) if tensor is not None]

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    def move_into(self, place: LoraWeights) -> None:
        """Copy the tensors into those of `place` and refer to these from now on: the old memory can be freed."""
        for own, other in zip(self.tensors, place.tensors, strict=True):
            other.copy_(own.view_as(other))
        vars(self).update(vars(place))


@dataclass
class BlockWeights(LoraWeights):
    """An expert's tensors for one parameter of a mixture-of-experts block: each of its N matrices has an A and a B.

    PEFT's files hold them as two matrices (`from_file`, `as_file`), the ranks of A beside each other matrix by matrix,
    those of B rank by rank.

    Args:
        A: (N, r, in).
        B: (N, out, r).
        exchanged: whether what is A here is B in PEFT's files: PEFT takes a parameter that is stored as (N, in, out)
            for (N, out, in), unless its block says `is_transposed`.

    Source: PEFT 0.21.2, `tuners/lora/layer.py`, `ParamWrapper`.
    """

    A: Float[Tensor, "N r n"]
    B: Float[Tensor, "N out r"]
    exchanged: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @classmethod
    def from_file(cls, A: Float[Tensor, "Nr n"], B: Float[Tensor, "out Nr"], count: int, *, exchanged: bool) -> Self:
        """The tensors of a file: views. `count` is N."""
        down = A.reshape(count, -1, A.shape[1])
        up = B.reshape(len(B), -1, count).permute(2, 0, 1)
        return cls(up.mT, down.mT, exchanged=True) if exchanged else cls(down, up)

    def as_file(self) -> LoraWeights:
        """The tensors that a file holds."""
        down, up = (self.B.mT, self.A.mT) if self.exchanged else (self.A, self.B)
        return LoraWeights(down.flatten(0, 1), up.permute(1, 2, 0).flatten(1))


@dataclass
class Adapter:
    """One expert: y = base(x) + c B A x in each of its modules, with c = `scaling(module_path)`.

    Args:
        name: the expert's name in the mixture.
        config: its configuration.
        weights: module path, as in `base.named_modules()`, -> tensors; of a parameter of a mixture-of-experts block its
            path. Right after reading, the paths are those of the file (`on_base` names them as the base model does).
        source: the folder or Hub identifier that it was read from; for messages and records.
        base_weights: parameter name, as in `base.named_parameters()`, -> the weight of the base model that the file
            holds: of an embedding that was adapted, resized or trained, or of a module in `modules_to_save`
            (`base_weights.py`). Right after reading, trained tokens are the rows of `TOKEN_ROWS` below their module.
    """

    name: str
    config: LoraConfig
    weights: dict[str, LoraWeights]
    source: str = ""
    base_weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def rank(self, module_path: str) -> int:
        """r of a module: by `rank_pattern` if a key matches its path, else `r`."""
        return self._by_pattern(self.config.rank_pattern, module_path, self.config.r)

    def alpha(self, module_path: str) -> float:
        """alpha of a module, likewise by `alpha_pattern`."""
        return self._by_pattern(self.config.alpha_pattern, module_path, self.config.lora_alpha)

    def _by_pattern(self, patterns: Mapping[str, _Value], module_path: str, default: _Value) -> _Value:
        plain = pattern_value(patterns, self.pattern_key(unwrapped(module_path)), default)
        return pattern_value(patterns, self.pattern_key(module_path), plain)

    def scaling(self, module_path: str) -> float:
        """c of a module: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank, alpha = self.rank(module_path), self.alpha(module_path)
        return alpha / math.sqrt(rank) if self.config.use_rslora else alpha / rank

    def pattern_key(self, module_path: str) -> str:
        """What the patterns match: the path, or the name of the weight where `target_parameters` names that."""
        weight = f"{module_path}.weight"
        return weight if self.config.targets_parameter(weight) else module_path

    def renamed(self, old: str, new: str) -> Adapter:
        """The expert for a base model that has other names: `old` in a path, or at an end of it, becomes `new`.

        The first place where `old` is whole components of a path is renamed, in tensors, patterns and targets alike. If
        `old` is empty, `new` is put in front of every path.
        """
        config = self.config
        targets = config.target_modules
        if targets is not None:
            targets = (
                renamed(targets, old, new) if isinstance(targets, str) else {renamed(t, old, new) for t in targets}
            )
        changed = replace(
            config,
            target_modules=targets,
            rank_pattern={renamed(key, old, new): rank for key, rank in config.rank_pattern.items()},
            alpha_pattern={renamed(key, old, new): alpha for key, alpha in config.alpha_pattern.items()},
        )
        return replace(
            self,
            config=changed if old else config,
            weights={renamed(path, old, new): each for path, each in self.weights.items()},
            base_weights={renamed(name, old, new): each for name, each in self.base_weights.items()},
        )

    def mapped(self, key_mapping: Mapping[str, str]) -> Adapter:
        """The expert with other paths, as PEFT's `key_mapping` changes keys.

        Args:
            key_mapping: regular expressions and replacements; the first that is found in a path is replaced.

        Raises:
            ConfigurationError: what is no such mapping.
        """

        def new(path: str) -> str:
            for pattern, replacement in key_mapping.items():
                changed, count = re.subn(pattern, replacement.lstrip("^"), path)
                if count:
                    return changed
            return path

        try:
            weights = {new(path): each for path, each in self.weights.items()}
            base_weights = {new(name): each for name, each in self.base_weights.items()}
        except (re.error, AttributeError, TypeError) as error:
            raise ConfigurationError(
                "key_mapping holds regular expressions and replacements.",
                received=f"key_mapping={key_mapping!r}: {error}",
                remedy='pass for example key_mapping={"^model": "language_model.model"}',
            ) from error
        targets = self.config.target_modules
        if targets is not None and not isinstance(targets, str):
            targets = {new(target) for target in targets}
        return replace(
            self, config=replace(self.config, target_modules=targets), weights=weights, base_weights=base_weights
        )


def renamed(name: str, old: str, new: str) -> str:
    """What `Adapter.renamed` makes of a path, a parameter's name, or an expression for them."""
    if not old:
        return new + name
    escaped = re.escape(old)
    if escaped in name:
        old, new = escaped, re.escape(new)
    end = "" if old.endswith(".") else r"(?![\w-])"
    return re.sub(rf"(?<![\w-]){re.escape(old)}{end}", lambda _: new, name, count=1)


def of_another_base(adapter: Adapter, what: str) -> AdapterMismatchError:
    """The error for an expert that was trained on another base model; `what` shows it."""
    base = adapter.config.base_model_name_or_path
    return AdapterMismatchError(
        "An expert adapts the modules of the base model it was trained on.",
        received=f"expert {adapter.name!r}, {what}",
        remedy=f"use an expert that was trained on this base model, not on {repr(base) if base else 'another one'}"
        + (f"; or load that one: AutoModelForCausalLM.from_pretrained({base!r})" if base else ""),
    )


def refuse_infinite(name: str, weights: Mapping[str, LoraWeights]) -> None:
    """Refuse an expert whose tensors hold an infinite number or NaN.

    Args:
        name: the expert's name, for the message.
        weights: its tensors by module path.

    Raises:
        CorruptCheckpointError: naming the expert and the module.
    """
    for path, part in weights.items():
        if not all_finite(part.tensors):
            raise CorruptCheckpointError(
                "An expert's matrices hold finite numbers.",
                received=f"expert {name!r}: module {path!r} with infinite ones, or NaN",
                remedy="Download the adapter again, or train it again: its training has diverged.",
            )


def pattern_value(patterns: Mapping[str, _Value], module_path: str, default: _Value) -> _Value:
    """The value of the first key that, as a regular expression, matches the path or its end after a dot.

    Source: PEFT 0.21.2, `utils/other.py`, `get_pattern_key`.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module_path):
            return value
    return patterns.get(module_path, default)
