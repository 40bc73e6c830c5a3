"""Weights of the base model that experts' files hold: embeddings with trained or new rows, and heads.

PEFT saves the embeddings' weights where they were adapted, resized or trained, and the modules that `modules_to_save`
names, or of `trainable_token_indices` the rows; a classification task names its head by itself. With `bias`, the base
model's biases are saved. A mixture has one weight for all experts. Where every expert that
holds it agrees, and the base model's is another, theirs is used.

Source: PEFT 0.21.2, `utils/save_and_load.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.config.folder import CONFIG_NAME
from loramix.errors import (
    AdapterMismatchError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    UnsupportedAdapterError,
)
from loramix.experts.adapter import TOKEN_ROWS, Adapter, of_another_base
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
        holders = _holders(adapters, names, chosen)
        if mine is None and holders:
            _refuse_untied(own, names, holders)
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


def conflicting(model: PreTrainedModel, adapters: Sequence[Adapter], chosen: str | None = None) -> list[str]:
    """The names of the saved weights in which experts disagree, or that cannot take the place of the base model's.

    Arguments as for `own_rows`.
    """
    weights, found = _weights(model), list[str]()
    for names in _tied(weights):
        holders = _holders(adapters, names, chosen)
        if not holders:
            continue
        try:
            _refuse_untied(weights[names[0]], names, holders)
            mine = _agreed(holders, only_first=chosen is not None)
        except (AdapterMismatchError, UnsupportedAdapterError):
            found += names
            continue
        if weights[names[0]].is_meta and not bool(same(kept_tensor(model, names[0]), mine).all()):
            found += names
    return found


def _holders(adapters: Sequence[Adapter], names: Sequence[str], chosen: str | None) -> list[tuple[Adapter, str]]:
    """The experts that hold a weight under one of its names, the chosen one first."""
    found = [(each, name) for each in adapters for name in names if name in each.base_weights]
    return sorted(found, key=lambda holder: holder[0].name != chosen)


def without_names(model: nn.Module, adapter: Adapter, names: Collection[str]) -> Adapter:
    """The expert without these of its base weights; its configuration does not name their modules either."""
    kept = {name: saved for name, saved in adapter.base_weights.items() if name not in names}
    declared = [
        part
        for part in adapter.config.modules_to_save or ()
        if not any(_names_around(part, name.rpartition(".")[0]) for name in _weights(model) if name in names)
    ]
    config = replace(adapter.config, modules_to_save=declared or None)
    return replace(adapter, config=config, base_weights=kept)


def settle_base_weights(model: PreTrainedModel, adapter: Adapter) -> Adapter:
    """The expert with trained tokens as whole embeddings, and without copies of weights that it does not bring.

    Args:
        model: the base model.
        adapter: the expert, by the base model's names.

    Raises:
        IncompleteCheckpointError: another number of rows than of trained tokens.
        AdapterMismatchError: tokens that the base model does not have.
    """
    if not adapter.base_weights:
        return adapter
    weights, embeddings, found = _weights(model), embedding_paths(model), dict[str, Tensor]()
    for name, saved in adapter.base_weights.items():
        path = name.removesuffix(f".{TOKEN_ROWS}")
        if path != name and f"{path}.weight" in weights:
            plain = _is_plain(weights[f"{path}.weight"])
            found[f"{path}.weight"] = _with_rows(model, adapter, path, saved) if plain else saved
            continue
        own = weights.get(name)
        brought = _is_brought(adapter, name) or name.rpartition(".")[0] in embeddings
        copied = not brought and own is not None and own.shape == saved.shape and not own.is_meta
        if own is None or not copied or not _is_plain(own) or not bool(same(own, saved).all()):
            found[name] = saved
    config = replace(adapter.config, trainable_token_indices=None)
    return replace(adapter, config=config, base_weights=found)


def _with_rows(model: PreTrainedModel, adapter: Adapter, path: str, rows: Tensor) -> Tensor:
    """An embedding's weight with the rows of an expert's trained tokens."""
    given: object = adapter.config.trainable_token_indices
    if isinstance(given, Mapping):
        named = cast("Mapping[str, list[int]]", given)
        given = next((numbers for name, numbers in named.items() if f".{path}".endswith(f".{name}")), [])
    numbers = given or []
    whole = kept_tensor(model, f"{path}.weight").detach().clone()
    if rows.dim() != 2 or len(rows) != len(numbers) or rows.shape[1:] != whole.shape[1:]:
        raise IncompleteCheckpointError(
            "An expert's file holds a row for each of trainable_token_indices.",
            received=f"expert {adapter.name!r}: {tuple(rows.shape)} for {len(numbers)} tokens of {path!r}, "
            f"{tuple(whole.shape)}",
            remedy="save or download the adapter again",
        )
    if not all(0 <= number < len(whole) for number in numbers):
        raise AdapterMismatchError(
            "An expert is put on a base model with the vocabulary it was trained with.",
            received=f"expert {adapter.name!r}: trained tokens up to {max(numbers)}; the base model has {len(whole)}",
            remedy=resizing_remedy(max(numbers) + 1, len(whole)),
        )
    whole[numbers] = rows.to(whole)
    return whole


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
            raise AdapterMismatchError(
                "A weight that is saved with an expert takes the place of one of its base model's.",
                received=f"expert {adapter.name!r}, module {path or name!r}: the base model has no weight {name!r}",
                remedy=f"{of_another_base(adapter, '').remedy}; or leave the weight out: drop_unsupported=True",
            )
        if not (_is_brought(adapter, name) or path in embeddings or path in adapter.weights):
            raise UnsupportedAdapterError(
                "An expert's file holds LoRA tensors, embeddings, and the modules of modules_to_save.",
                received=f"expert {adapter.name!r}: the weight {name!r}",
                remedy=f"add {path!r} to modules_to_save in {CONFIG_NAME}, or leave the weight out: "
                "drop_unsupported=True",
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
            raise AdapterMismatchError(
                "Embeddings that are saved with an expert resemble its base model's.",
                received=f"expert {adapter.name!r}, module {path!r}: most saved rows have nothing in common with the "
                "base model's, so it is another one, or they were trained for long",
                remedy=f"{of_another_base(adapter, '').remedy}; where it is this base model, add {path!r} to "
                f"modules_to_save in {CONFIG_NAME}, or leave the rows out: drop_unsupported=True",
            )


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
    return any(_names_around(name, path) for name in adapter.config.modules_to_save or ())


def _names_around(name: str, path: str) -> bool:
    """Whether a name is that of a module, or of one around it."""
    parts = path.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)))


def _is_brought(adapter: Adapter, name: str) -> bool:
    """Whether the configuration says that the expert brings this weight of the base model."""
    return (adapter.config.bias == "all" and name.endswith("bias")) or is_declared(adapter, name.rpartition(".")[0])


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
                remedy=f"choose whose are used, for example base_weights_of={first.name!r}, or use the base model's: "
                "drop_unsupported=True",
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
