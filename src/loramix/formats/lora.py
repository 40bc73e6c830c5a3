"""One LoRA expert in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

Keys are `base_model.model.<module path>.<part>`. Also read: keys with the prefix missing or repeated, with the names of
wrappers in any place (`config/wrappers.py`), with an adapter's name after the part (`lora_A.default.weight`), whole
state dicts of PEFT's model (`modules_to_save.default`, `original_module`), and `lora_magnitude_vector.weight`.

An expert that adapts an embedding also holds that embedding's own weight, `<module path>.base_layer.weight`; one whose
vocabulary was resized holds `<module path>.weight`, and so does one with `modules_to_save`. Whether the base model has
such a weight, and which of them an expert may bring, is told when the expert is put on it; likewise, which parameters
of a mixture-of-experts block the tensors of its path belong to (`experts/on_base.py`).

Source: PEFT 0.21.2, `utils/save_and_load.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from loramix.config.base import PeftType
from loramix.config.folder import CONFIG_NAME, KOHYA_REMEDY, MLX_REMEDY, find_config
from loramix.config.lora import LoraConfig
from loramix.config.wrappers import unwrapped
from loramix.errors import CorruptCheckpointError, IncompleteCheckpointError, UnsupportedAdapterError
from loramix.experts.adapter import TOKEN_ROWS, WRAPPED, Adapter, BlockWeights, LoraWeights
from loramix.experts.features import refuse_unsupported
from loramix.files.atomic import Writer, text_writer
from loramix.files.location import Location
from loramix.files.tensors import write_tensors
from loramix.formats.format import ExpertFormat, register_format
from loramix.formats.peft import WEIGHTS_NAME, check_replaceable, peft_type, read_weights

PREFIX = "base_model.model."
A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"

_OF_A_CLASSIFIER = "internal_xlora_classifier."  # the original X-LoRA library saves its biases with each expert
_LORA_KEY = re.compile(
    r"(?P<path>.+)\."
    r"(?:(?P<matrix>lora_[AB])(?:\.[^.]+)?\.(?P<leaf>weight|bias)"
    r"|(?P<vector>lora_embedding_[AB]|lora_magnitude_vector)(?:\.[^.]+){0,2})"
)
_BASE_KEY = re.compile(r"(?P<path>(?!.*\blora_).+?)(?:\.base_layer)?\.(?P<leaf>weight|bias)")
_ROWS_KEY = re.compile(rf"(?P<path>.+?)(?:\.base_layer)?\.{re.escape(TOKEN_ROWS)}(?:\.[^.]+)?")
_TRAINED_COPY = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")
_UNTRAINED_COPY = ".original_module."


class LoraFormat(ExpertFormat):
    """PEFT's LoRA layout."""

    name = "lora"
    resumable = True

    def matches(self, location: Location) -> bool:
        return peft_type(location) == PeftType.LORA

    def read(self, location: Location, name: str, config: LoraConfig | None = None) -> Adapter:
        saved = LoraConfig.from_json_file(find_config(location))
        config = config or saved
        refuse_unsupported(config, name)
        config = config.without_wrappers()
        weights, base_weights = parse_tensors(name, config, read_weights(location))
        return Adapter(name, config, weights, source=str(location), base_weights=base_weights)

    def writers(self, content: Adapter) -> dict[str, Writer]:
        return expert_writers(content)

    def check_folder(self, folder: Path, content: Adapter) -> None:
        check_replaceable(folder, LoraConfig)


register_format(LoraFormat())


def expert_writers(expert: Adapter) -> dict[str, Writer]:
    """The writers of an expert's files, by file name."""
    return {
        WEIGHTS_NAME: partial(write_tensors, tensors=format_tensors(expert)),
        CONFIG_NAME: text_writer(expert.config.to_json()),
    }


def parse_tensors(
    name: str, config: LoraConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, LoraWeights], dict[str, Tensor]]:
    """Sort a file's tensors by module.

    Returns:
        module path -> the expert's tensors; and parameter name -> the weight of the base model, if the file holds it.

    Raises:
        UnsupportedAdapterError: a key that is not LoRA's.
        CorruptCheckpointError: two keys for one tensor, or a tensor that contradicts the configuration.
        IncompleteCheckpointError: A without B, B without A, or neither for any module; no rows of trained tokens.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    base_weights: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.startswith(_OF_A_CLASSIFIER) or _UNTRAINED_COPY in key:
            continue
        path, part = _parse_key(name, key)
        parts = modules.setdefault(path, {}) if part else base_weights
        if (part or path) in parts:
            raise CorruptCheckpointError(
                "A weights file must hold each tensor once.",
                received=f"expert {name!r}: {key!r} is the second for {part or 'the base model'} of {path!r}",
                remedy="Save the adapter again.",
            )
        parts[part or path] = tensor
    if not modules:
        raise IncompleteCheckpointError(
            "An expert's file holds lora_A and lora_B for at least one module.",
            received=f"expert {name!r}: {len(tensors)} tensors, none of them LoRA's",
            remedy="Save the adapter again; of a wrapped model save what is inside (model._orig_mod, model.module).",
        )
    if config.trainable_token_indices and not any(path.endswith(f".{TOKEN_ROWS}") for path in base_weights):
        raise IncompleteCheckpointError(
            "An expert's file holds the rows of trainable_token_indices.",
            received=f"expert {name!r}: {config.trainable_token_indices!r}, without {TOKEN_ROWS}",
            remedy="Save the adapter again.",
        )
    expert = Adapter(name, config, {})
    return {path: _weights_of(expert, path, parts) for path, parts in modules.items()}, base_weights


def format_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """An expert's tensors by PEFT's keys: the inverse of `parse_tensors`."""
    tensors: dict[str, Tensor] = {}
    for path, weights in _wrapped(adapter.weights).items():
        names = (EMBEDDING_A, EMBEDDING_B) if weights.embedding else (A, B)
        parts = zip((*names, BIAS, MAGNITUDE), (weights.A, weights.B, weights.bias, weights.magnitude), strict=True)
        tensors.update({f"{PREFIX}{path}.{part}": tensor for part, tensor in parts if tensor is not None})
    for name, tensor in adapter.base_weights.items():
        path, _, leaf = name.rpartition(".")
        tensors[f"{PREFIX}{path}.base_layer.{leaf}" if path in adapter.weights else PREFIX + name] = tensor
    return tensors


def _wrapped(weights: Mapping[str, LoraWeights]) -> dict[str, LoraWeights]:
    """The tensors by a file's paths: a block is wrapped once for each of its parameters, the first one innermost."""
    found: dict[str, LoraWeights] = {}
    for path, each in reversed(list(weights.items())):
        if isinstance(each, BlockWeights):
            path, each = path.rpartition(".")[0], each.as_file()
            while path in found:
                path += WRAPPED
        found[path] = each
    return dict(reversed(list(found.items())))


def _parse_key(name: str, key: str) -> tuple[str, str | None]:
    """The module path, and the part; the parameter's name, and None, for a weight of the base model."""
    stripped = unwrapped(key)
    while stripped.startswith(PREFIX):
        stripped = stripped.removeprefix(PREFIX)
    stripped = _TRAINED_COPY.sub("", stripped)
    lora = _LORA_KEY.fullmatch(stripped)
    if lora is not None:
        part = lora["vector"] or f"{lora['matrix']}.{lora['leaf']}"
        if part != "lora_A.bias":
            return lora["path"], part
    rows = _ROWS_KEY.fullmatch(stripped)
    if rows is not None:
        return f"{rows['path']}.{TOKEN_ROWS}", None
    base = _BASE_KEY.fullmatch(stripped)
    if base is not None:
        return f"{base['path']}.{base['leaf']}", None
    found, remedy = next(
        ((f", of {tool}", remedy) for pattern, tool, remedy in _FOREIGN if re.search(pattern, key)),
        ("", "Leave this expert out, or train it without what this tensor belongs to."),
    )
    raise UnsupportedAdapterError(
        "An expert's file holds LoRA tensors and weights of its base model, by PEFT's keys.",
        received=f"expert {name!r}: key {key!r}{found}",
        remedy=remedy,
    )


_FOREIGN = (
    (r"^lora_\w+\.(?:alpha|dora_scale|lora_(?:up|down)\.weight)$|\.lora_(?:up|down)\.weight$", "kohya's", KOHYA_REMEDY),
    (r"\.lora_[ab]$", "mlx-lm's", MLX_REMEDY),
)
"""What keys of other tools look like, the tool, and the remedy."""


def _weights_of(expert: Adapter, path: str, parts: Mapping[str, Tensor]) -> LoraWeights:
    embedding = EMBEDDING_A in parts or EMBEDDING_B in parts
    config = expert.config
    needed = [EMBEDDING_A, EMBEDDING_B] if embedding else [A, B]
    needed += [BIAS] if config.lora_bias and not embedding else []
    needed += [MAGNITUDE] if config.use_dora else []
    missing = [part for part in needed if part not in parts]
    if missing:
        raise IncompleteCheckpointError(
            "An expert's file holds every tensor of each module.",
            received=f"expert {expert.name!r}: module {path!r} has {_listed(parts)}, but no {', '.join(missing)}",
            remedy="Save or download the adapter again.",
        )
    if len(parts) > len(needed):
        raise CorruptCheckpointError(
            "An expert's file holds the tensors that its configuration asks for.",
            received=f"expert {expert.name!r}: module {path!r} has {_listed(parts)}, expected {', '.join(needed)} "
            f"with use_dora={config.use_dora}, lora_bias={config.lora_bias}",
            remedy="Correct adapter_config.json, or save the adapter again.",
        )
    first, second = parts[needed[0]], parts[needed[1]]
    _check_shapes(expert, path, first, second, parts)
    return LoraWeights(first, second, parts.get(BIAS), parts.get(MAGNITUDE), embedding)


def _check_shapes(expert: Adapter, path: str, first: Tensor, second: Tensor, parts: Mapping[str, Tensor]) -> None:
    if not all(tensor.numel() for tensor in parts.values()):
        raise IncompleteCheckpointError(
            "An expert's file holds its tensors whole.",
            received=f"expert {expert.name!r}: module {path!r} with empty tensors, as DeepSpeed ZeRO-3 and FSDP leave "
            "them when nobody gathers the parts",
            remedy="Save it again with its parts gathered: stage3_gather_16bit_weights_on_model_save=true for ZeRO-3, "
            "fsdp_state_dict_type FULL_STATE_DICT for FSDP.",
        )
    rank, bias, magnitude = expert.rank(path), parts.get(BIAS), parts.get(MAGNITUDE)
    told_later = bool(expert.config.target_parameters)  # whether it is r, or r times the matrices of a parameter
    fits = (
        all(tensor.is_floating_point() for tensor in parts.values())
        and first.ndim >= 2
        and second.ndim == first.ndim
        and first.shape[0] == second.shape[1]
        and (first.shape[0] == rank or told_later)
        and (bias is None or bias.shape == second.shape[:1])
        and (magnitude is None or magnitude.numel() == second.shape[0])
    )
    if not fits:
        found = ", ".join(f"{part} {tuple(tensor.shape)} {tensor.dtype}" for part, tensor in parts.items())
        raise CorruptCheckpointError(
            "An expert's matrices are A (r, in) and B (out, r), with r from its configuration.",
            received=f"expert {expert.name!r}: module {path!r} expected r={rank}, found {found}",
            remedy="Correct r or rank_pattern in adapter_config.json, or save the adapter again.",
        )


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts)
