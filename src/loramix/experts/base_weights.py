"""Weights of the base model that experts' files hold: embeddings with trained or new rows, and heads.

PEFT saves the embeddings' weights where they were adapted, resized or trained, and the modules that `modules_to_save`
names; a classification task names its head by itself. A mixture has one weight for all experts. Where every expert that
holds it agrees, and the base model's is another, theirs is used.

Source: PEFT 0.21.2, `utils/save_and_load.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.errors import (
    AdapterMismatchError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedAdapterError,
)
from loramix.experts.adapter import Adapter, of_another_base
from loramix.experts.base_layers import is_quantised
from loramix.experts.offload import kept_tensor
from loramix.files.tensors import all_finite

_UNLIKE = 0.7  # of the longer of two rows: unrelated rows are further apart than that, trained ones are not


class OwnRows(NamedTuple):
    """Rows of a weight of the base model that are the mixture's own.

    Attributes:
        name: of the parameter.
        rows: (n,) their numbers, along the first dimension.
        values: (n, …) what they are to be, in their file's dtype.
    """

    name: str
    rows: Int[Tensor, " n"]
    values: Tensor


def own_rows(
    model: PreTrainedModel,
    adapters: Sequence[Adapter],
    chosen: str | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> list[OwnRows]:
    """The rows in which the experts' saved weights differ from the base model's, and are to be used.

    Args:
        model: the base model.
        adapters: the experts.
        chosen: the name of the expert whose weights are used where experts disagree.
        given: whole weights that are used whatever the experts' files hold: those of a saved mixture.

    Raises:
        ConfigurationError: `chosen` is no expert that holds weights.
        IncompleteCheckpointError: a module that `modules_to_save` names, and the file lacks.
        UnsupportedAdapterError: rows of a weight that is offloaded.
        AdapterMismatchError: experts that disagree, or weights of another base model.
    """
    given = given or {}
    _check_chosen(adapters, chosen)
    weights = _weights(model)
    for name, tensor in given.items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = tuple(weights[name].shape) if name in weights else "none"
            raise AdapterMismatchError(
                "A mixture's own weights fit its base model.",
                received=f"{name!r}: expected {tuple(tensor.shape)}, found {found}",
                remedy="load the base model that the mixture was saved with, its vocabulary resized the same way",
            )
    for adapter in adapters:
        _check_complete(model, adapter, weights)
    made: list[OwnRows] = []
    for names in _tied(weights):
        own = weights[names[0]]
        mine = next((given[name] for name in names if name in given), None)
        holders = [(each, name) for each in adapters for name in names if name in each.base_weights]
        if mine is None and holders:
            _refuse_untied(own, names, holders)
            holders.sort(key=lambda holder: holder[0].name != chosen)
            mine = _agreed(holders, only_first=chosen is not None)
        if mine is None:
            continue
        rows = _rows(~same(kept_tensor(model, names[0]), mine))
        if len(rows):
            if own.is_meta:
                raise _offloaded(names[0], rows)
            made.append(OwnRows(names[0], rows, mine.detach()[rows.to(mine.device)]))
            if not any(name in given for name in names):
                _warn(adapters, holders, names[0], rows)
    return made


def check_base_weights(model: PreTrainedModel, adapter: Adapter) -> None:
    """Check that the base model's weights in an expert's file can be those of this base model.

    Raises:
        UnsupportedAdapterError: the weight of a module that is neither an embedding, nor adapted, nor in
            `modules_to_save`.
        AdapterMismatchError: no such weight, another shape, or the weight of another base model.
        CorruptCheckpointError: an infinite number or NaN.
    """
    if not adapter.base_weights:
        return
    weights, embeddings, modules = _weights(model), embedding_paths(model), dict(model.named_modules())
    for name, saved in adapter.base_weights.items():
        path, own = name.rpartition(".")[0], weights.get(name)
        declared = is_declared(adapter, path)
        packed = own is None and path in modules and is_quantised(modules[path])
        if packed or (own is not None and not _is_plain(own)) or not saved.is_floating_point():
            raise UnsupportedAdapterError(
                "A weight that is saved with an expert takes the place of a plain weight.",
                received=f"expert {adapter.name!r}: {name!r} of {saved.dtype}, where the base model's is quantised",
                remedy="load the base model without quantising this module, or train the expert without it",
            )
        if own is None:
            raise _another(adapter, path or name, "the base model has no such weight, and")
        if not (declared or path in embeddings or path in adapter.weights):
            raise UnsupportedAdapterError(
                "An expert's file holds LoRA tensors, embeddings, and the modules of modules_to_save.",
                received=f"expert {adapter.name!r}: the weight {name!r}",
                remedy="leave this expert out, or train it without what this tensor belongs to",
            )
        if own.shape != saved.shape:
            raise _other_shape(adapter, path, own, saved)
        if not all_finite([saved]):
            raise CorruptCheckpointError(
                "The weights in an expert's file are finite numbers.",
                received=f"expert {adapter.name!r}: {name!r} with infinite ones, or NaN",
                remedy="download the adapter again, or train it again: its training has diverged",
            )
        if not declared and own.dim() > 1 and not own.is_meta and _unrelated(own, saved):
            raise _another(adapter, path, "the file holds the weight of its own base model, and")


def embedding_paths(model: PreTrainedModel) -> set[str]:
    """The paths of the input and output embeddings, as the model itself names them."""
    ends: list[nn.Module | None] = []
    for ask in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            ends.append(ask())
        except (NotImplementedError, AttributeError):  # a model without such a part
            continue
    return {path for path, module in model.named_modules(remove_duplicate=False) if any(module is end for end in ends)}


def is_declared(adapter: Adapter, path: str) -> bool:
    """Whether `modules_to_save` names a module, or one around it; a name is the end of a path, as in PEFT."""
    names = adapter.config.modules_to_save or []
    parts = path.split(".")
    whole = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(_is_named(names, outer) for outer in whole)


def same(own: Tensor, saved: Tensor) -> Bool[Tensor, ...]:
    """Element by element, whether two weights are equal but for rounding to the coarser of their dtypes."""
    own, saved = own.detach(), saved.detach().to(own.device)
    wide = torch.promote_types(own.dtype, saved.dtype)
    if wide in (own.dtype, saved.dtype):
        narrow = saved.dtype if wide == own.dtype else own.dtype
        return own.to(narrow) == saved.to(narrow)
    own, saved = own.float(), saved.float()  # bfloat16 and float16: neither holds the other's numbers
    return (own - saved).abs() <= torch.finfo(torch.bfloat16).eps * own.abs() + torch.finfo(torch.float16).tiny


def numbered(rows: Iterable[int]) -> str:
    """Numbers as ranges, the first five: "3, 512–515"."""
    ranges: list[list[int]] = []
    for row in rows:
        if ranges and row == ranges[-1][1] + 1:
            ranges[-1][1] = row
        else:
            ranges.append([row, row])
    shown = [str(first) if first == last else f"{first}–{last}" for first, last in ranges[:5]]
    return ", ".join(shown) + (" and more" if len(ranges) > 5 else "")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, those that are tied under all of their names."""
    return dict(model.named_parameters(remove_duplicate=False))


def _tied(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each weight."""
    names: dict[int, list[str]] = {}
    for name, tensor in weights.items():
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def _refuse_untied(own: Tensor, names: Sequence[str], holders: Sequence[tuple[Adapter, str]]) -> None:
    """Refuse an expert that has several weights where the base model has one, tied."""
    for adapter in dict.fromkeys(adapter.name for adapter, _ in holders):
        held = {name: each for each, name in holders if each.name == adapter}
        first, *others = [(name, each.base_weights[name]) for name, each in held.items()]
        untied = any(is_declared(each, name.rpartition(".")[0]) for name, each in held.items())
        missing = [name for name in names if name not in held] if untied else []
        differing = [name for name, saved in others if not bool(same(first[1], saved).all())]
        if differing or (missing and not bool(same(own, first[1]).all())):
            raise UnsupportedAdapterError(
                "An expert has one weight where the base model ties its embeddings and its head.",
                received=f"expert {adapter!r} with {first[0]!r} of its own, and another {(differing + missing)[0]!r}",
                remedy="load the base model with tie_word_embeddings=False, or leave this expert out",
            )


def _agreed(holders: Sequence[tuple[Adapter, str]], *, only_first: bool) -> Tensor:
    """The weight that all holders have, or the first's."""
    first, name = holders[0]
    mine = first.base_weights[name]
    for other, alias in holders[1:]:
        if only_first and other is not first:
            continue
        unequal = _rows(~same(mine, other.base_weights[alias]))
        if len(unequal):
            raise AdapterMismatchError(
                "The experts of a mixture share its embeddings and heads.",
                received=f"experts {first.name!r} and {other.name!r} with different rows "
                f"{numbered(unequal.tolist())} of {alias!r}",
                remedy=f"choose whose are used, for example base_weights_of={first.name!r}, or leave one of them out",
            )
    return mine


def _warn(adapters: Sequence[Adapter], holders: Sequence[tuple[Adapter, str]], name: str, rows: Tensor) -> None:
    """Warn which experts' weight is used, unless every expert declares that it brings one."""
    path = name.rpartition(".")[0]
    holding = list(dict.fromkeys(repr(adapter.name) for adapter, _ in holders))
    if len(holding) == len(adapters) and all(is_declared(adapter, path) for adapter, _ in holders):
        return
    whose = f"expert {holding[0]}" if len(holding) == 1 else f"experts {', '.join(holding)}"
    warnings.warn(
        f"The base model's {name!r} differs from the one saved with {whose} in rows {numbered(rows.tolist())}: the "
        "saved rows are used, for all experts.",
        stacklevel=5,
    )


def _offloaded(name: str, rows: Tensor) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        "Rows that are saved with an expert take the place of rows in memory.",
        received=f"rows {numbered(rows.tolist())} of {name!r}, which accelerate has offloaded",
        remedy="load the base model with a device_map that keeps this module in memory",
    )


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def _rows(differing: Tensor) -> Int[Tensor, " n"]:
    """The rows, along the first dimension, with an element that is True."""
    flat = differing.reshape(len(differing), -1) if differing.dim() else differing.reshape(1, 1)
    return flat.any(1).nonzero()[:, 0]


def _unrelated(own: Tensor, saved: Tensor) -> bool:
    """Whether most rows are uncorrelated, as those of different base models are."""
    own, saved = own.detach().float().flatten(1), saved.to(own.device).float().flatten(1)
    longer = torch.maximum(own.norm(dim=1), saved.norm(dim=1))
    return bool(((own - saved).norm(dim=1) > _UNLIKE * longer).float().mean() > 0.5)


def _check_chosen(adapters: Sequence[Adapter], chosen: str | None) -> None:
    holding = [adapter.name for adapter in adapters if adapter.base_weights]
    if chosen is not None and chosen not in holding:
        raise ConfigurationError(
            "base_weights_of names an expert whose file holds embeddings or a head.",
            received=f"base_weights_of={chosen!r}, and such experts: {', '.join(map(repr, holding)) or 'none'}",
            remedy="name one of these, or leave base_weights_of out",
        )


def _check_complete(model: nn.Module, adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    names = adapter.config.modules_to_save or []
    paths = [path for path, _ in model.named_modules() if _is_named(names, path)]
    missing = [
        name for name in weights for path in paths if name.startswith(f"{path}.") and name not in adapter.base_weights
    ]
    if missing:
        raise IncompleteCheckpointError(
            "An expert's file holds the modules that modules_to_save names.",
            received=f"expert {adapter.name!r} with modules_to_save={names!r}, without "
            f"{', '.join(map(repr, missing[:3]))}",
            remedy="save the expert again, or use the base model class that it was trained with",
        )


def _is_named(names: Iterable[str], path: str) -> bool:
    return any(path.endswith(name) for name in names)


def _another(adapter: Adapter, path: str, what: str) -> AdapterMismatchError:
    return of_another_base(adapter, f"module {path!r}: {what} it is another one")


def _other_shape(adapter: Adapter, path: str, own: Tensor, saved: Tensor) -> AdapterMismatchError:
    if own.shape[1:] != saved.shape[1:] or not own.dim():
        return _another(adapter, path, f"expected {tuple(own.shape)}, found {tuple(saved.shape)}:")
    return AdapterMismatchError(
        "An expert is put on a base model with the vocabulary it was trained with.",
        received=f"expert {adapter.name!r}, module {path!r}: saved with {len(saved)} rows; the base model has "
        f"{len(own)}, so its vocabulary was resized, or it is another one",
        remedy=resizing_remedy(len(saved), len(own)),
    )


def resizing_remedy(saved: int, own: int) -> str:
    """The remedy where an expert was trained with `saved` tokens, and the base model has `own`."""
    if saved > own:
        return f"call base.resize_token_embeddings({saved}) before the experts are put on"
    return (
        "put the experts on the base model before its vocabulary is resized, and then call "
        f"model.resize_token_embeddings({own})"
    )
