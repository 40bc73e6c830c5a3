"""A new LoRA expert: its modules and its initial matrices (LoRA, arXiv 2106.09685, section 4).

r: the expert's rank in a module. N: matrices in a parameter of a mixture-of-experts block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, UnsupportedAdapterError
from loramix.experts.adapter import Adapter, BlockWeights, LoraWeights
from loramix.experts.base_layers import dense_weight, expected_shapes, kind_of, refuse_module
from loramix.experts.blocks import BlockMatrices, with_matrices
from loramix.experts.features import refuse_unsupported
from loramix.experts.targets import ALL_LINEAR, new_targets
from loramix.files.hub import from_anywhere


def new_adapter(name: str, model: PreTrainedModel, config: LoraConfig) -> Adapter:
    """A new expert, which adds nothing yet: A is random and B zero; for an embedding, A is zero and B random.

    Args:
        name: the expert's name.
        model: the base model.
        config: the expert's configuration; it is kept, with "all-linear" replaced by the modules' names.

    Raises:
        UnsupportedAdapterError: an unsupported feature or module.
        ConfigurationError: no module to adapt, or an unknown `init_lora_weights`.
    """
    refuse_unsupported(config, name)
    beside = {field: getattr(config, field) for field in ("modules_to_save", "trainable_token_indices")}
    beside["bias"] = None if config.bias == "none" else config.bias
    if any(beside.values()):
        field, value = next((field, value) for field, value in beside.items() if value)
        raise UnsupportedAdapterError(
            "Modules that train beside a new expert are named by their gradients.",
            received=f"a new expert {name!r} with {field}={value!r}",
            remedy="leave it out, and call requires_grad_(True) on these modules once the expert is there: they are "
            "saved with it",
        )
    initialise = _initialiser(config)
    paths, modules = new_targets(model, config), with_matrices(model)
    if config.target_modules == ALL_LINEAR:
        linear = [path for path in paths if kind_of(modules[path]) == "linear"]
        config.target_modules = {path.rpartition(".")[2] for path in linear}
    for path in paths:
        refuse_module(modules[path], path, name, dora=config.use_dora)
    expert = Adapter(name, config, {}, source="")
    expert.weights = {path: _new_weights(modules[path], expert.rank(path), config, initialise) for path in paths}
    return expert


def new_member(model: PreTrainedModel, config: XLoraConfig, name: str) -> Adapter:
    """A new expert of a mixture, as its configuration says; task and base model are the mixture's.

    Args:
        model: the base model, which may be without weights (on the meta device).
        config: the mixture's, in which the expert's is completed.
        name: the expert's.

    Raises:
        UnsupportedAdapterError, ConfigurationError: as `new_adapter`, naming the expert.
    """
    own = config.new_experts[name]
    for field in ("task_type", "base_model_name_or_path", "revision"):
        if getattr(own, field) is None:
            setattr(own, field, getattr(config, field))
    try:
        return new_adapter(name, model, own)
    except (ConfigurationError, UnsupportedAdapterError) as error:
        if repr(name) in error.received:
            raise
        received = f"for the new expert {name!r}: {error.received}"
        raise type(error)(error.rule, received=received, remedy=error.remedy) from error


def settle_new(config: XLoraConfig) -> None:
    """Make a mixture's configuration what is saved, once its new experts exist: each lies in the folder of its name.

    Where all experts were new, `use_trainable_adapters` becomes True. Paths become absolute.
    """
    new = config.new_experts
    config.use_trainable_adapters |= len(new) == len(config.adapters)
    config.adapters = {n: n if n in new else from_anywhere(place) for n, place in config.adapters.items()}


def _new_weights(
    module: nn.Module, rank: int, config: LoraConfig, initialise: Callable[[Tensor], Tensor]
) -> LoraWeights:
    if isinstance(module, BlockMatrices):
        return _new_block_weights(module, rank, config, initialise)
    shape_A, shape_B = expected_shapes(module, rank)
    embedding = kind_of(module) == "embedding"
    A, B = torch.empty(shape_A), torch.empty(shape_B)
    start, other = (A, B) if not embedding else (B, A)  # random; and the one that makes the product zero
    (nn.init.normal_ if embedding else initialise)(start)
    if config.init_lora_weights is False:
        (nn.init.normal_ if embedding else _kaiming)(other)
    else:
        other.zero_()
    bias = torch.zeros(shape_B[0]) if config.lora_bias else None
    magnitude = torch.linalg.vector_norm(dense_weight(module), dim=1) if config.use_dora else None
    return LoraWeights(A, B, bias, magnitude, embedding)


def _new_block_weights(
    matrices: BlockMatrices, rank: int, config: LoraConfig, initialise: Callable[[Tensor], Tensor]
) -> BlockWeights:
    """Started as PEFT's file holds them: A (r · N, in) as one matrix."""
    count, inputs, outputs = matrices.sizes
    if matrices.exchanged:
        inputs, outputs = outputs, inputs
    A, B = torch.empty(rank * count, inputs), torch.zeros(outputs, rank * count)
    initialise(A)
    if config.init_lora_weights is False:
        _kaiming(B)
    return BlockWeights.from_file(A, B, count, exchanged=matrices.exchanged)


def _initialiser(config: LoraConfig) -> Callable[[Tensor], Tensor]:
    choice = config.init_lora_weights
    if isinstance(choice, bool):
        return _kaiming
    if choice == "gaussian":
        return lambda tensor: nn.init.normal_(tensor, std=1 / tensor.shape[0])
    raise ConfigurationError(
        "init_lora_weights of a new expert is True, False or 'gaussian'.",
        received=f"init_lora_weights={choice!r}",
        remedy="use init_lora_weights=True; an expert with another initialisation can be loaded once it is trained",
    )


def _kaiming(tensor: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
