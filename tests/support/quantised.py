"""Tiny Llamas that other packages have quantised, and the plain model of the weights that they compute with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from support.tiny import llama


class Kind(NamedTuple):
    """A way to quantise.

    Args:
        package: what it needs, by its import's name.
        make: the quantised model; the folder of the plain one is given.
        weight: what one of its layers computes with, by the package's own means.
        rounds: whether the layers round their input too.
        trains: whether they hand gradients on to it.
        copies: whether `copy.deepcopy` takes such a model.
    """

    package: str
    make: Callable[[Path], Any]
    weight: Callable[[Any], Tensor]
    rounds: bool = False
    trains: bool = True
    copies: bool = True


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """All but the head."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}


def dequantised(kind: Kind, quantised: Any) -> Any:
    """The plain model; compressed-tensors restores its weights in the first forward."""
    plain = llama()
    with torch.no_grad():
        quantised(torch.zeros(1, 1, dtype=torch.long))
        for path, layer in linear_layers(plain).items():
            layer.weight.copy_(kind.weight(quantised.get_submodule(path)))
    return plain


def _loaded(config: Callable[[], Any]) -> Callable[[Path], Any]:
    """As people do it: quantised while it is loaded."""
    return lambda folder: AutoModelForCausalLM.from_pretrained(folder, quantization_config=config()).eval()


def _replaced(make: Callable[[nn.Linear], nn.Module]) -> Callable[[Path], Any]:
    """By the package's own layers."""

    def quantise(_: Path) -> Any:
        model: Any = llama()
        for path, layer in linear_layers(model).items():
            model.set_submodule(path, make(layer))
        return model.eval()

    return quantise


def _bitsandbytes(**config: Any) -> Callable[[Path], Any]:
    return _loaded(lambda: transformers.BitsAndBytesConfig(**config))


def _four_bits(layer: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def _eight_bits(layer: Any) -> Tensor:
    scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data * scale.view(-1, 1) / 127


def _torchao(name: str, **config: Any) -> Callable[[Path], Any]:
    def quantise(_: Path) -> Any:
        from torchao import quantization

        model: Any = llama()
        quantization.quantize_(
            model,
            getattr(quantization, name)(**config),
            lambda module, path: isinstance(module, nn.Linear) and path != "lm_head",
        )
        return model

    return quantise


def _own(layer: Any) -> Tensor:
    return layer.weight.dequantize()


def _hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


def _quanto(_: Path) -> Any:
    from optimum.quanto import freeze, qint8, quantize

    model = llama()
    quantize(model, weights=qint8, exclude="lm_head")
    freeze(model)
    return model


def _compressed(*, rounds: bool = False) -> Callable[[Path], Any]:
    """Saved compressed and loaded again, as people do it."""

    def quantise(folder: Path) -> Any:
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
            apply_quantization_config,
        )

        model: Any = llama()
        weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
        inputs = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True) if rounds else None
        scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        apply_quantization_config(
            model,
            QuantizationConfig(
                config_groups={"all": scheme}, ignore=["lm_head"], quantization_status=QuantizationStatus.FROZEN
            ),
        )
        for layer in model.modules():
            if hasattr(layer, "weight_scale"):
                layer.weight_scale.data = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        compressor: Any = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        place = folder.parent / f"compressed {rounds}"
        model.save_pretrained(place)
        compressor.update_config(place)
        return AutoModelForCausalLM.from_pretrained(place).eval()

    return quantise


def _packed(awq: bool) -> Callable[[nn.Linear], nn.Module]:
    """A layer of GPT-QModel, its weight rounded to the nearest of 16 steps in groups of 32."""

    def make(layer: nn.Linear) -> nn.Module:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        groups = layer.weight.detach().unflatten(1, (-1, 32))
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low) / 15).half()
        zeros = (-low / scales.float()).round().clamp(0, 15).half()
        sizes = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": False}
        kind: Any = AwqTorchLinear if awq else TorchLinear
        new = kind(bits=4, group_size=32, sym=False, desc_act=False, register_buffers=True, **sizes)
        if awq:
            new.pack(layer, scales, zeros)
        else:
            new.pack_original(layer, scales, zeros, torch.arange(layer.in_features, dtype=torch.int32) // 32)
        new.post_init()
        return new

    return make


def _awq_weight(layer: Any) -> Tensor:
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    sizes = {"bits": layer.bits, "group_size": layer.group_size}
    return dequantize_gemm(qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales, **sizes).T


KINDS: dict[str, Kind] = {
    "nf4": Kind("bitsandbytes", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), _four_bits),
    "fp4": Kind("bitsandbytes", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"), _four_bits),
    "nf4 in bfloat16": Kind(
        "bitsandbytes",
        _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16),
        _four_bits,
    ),
    "llm.int8": Kind("bitsandbytes", _bitsandbytes(load_in_8bit=True), _eight_bits, rounds=True),
    "torchao int8": Kind("torchao", _torchao("Int8WeightOnlyConfig"), _own),
    "torchao int4": Kind("torchao", _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4), _own),
    "torchao float8": Kind("torchao", _torchao("Float8WeightOnlyConfig"), _own),
    "torchao int8 dynamic": Kind(
        "torchao", _torchao("Int8DynamicActivationInt8WeightConfig"), _own, rounds=True, trains=False
    ),
    "hqq": Kind("hqq", _replaced(_hqq), lambda layer: layer.dequantize()),
    "quanto": Kind("optimum.quanto", _quanto, _own, copies=False),
    "compressed-tensors": Kind("compressed_tensors", _compressed(), lambda layer: layer.weight.detach()),
    "compressed-tensors dynamic": Kind(
        "compressed_tensors",
        _compressed(rounds=True),
        lambda layer: layer.weight.detach(),
        rounds=True,
        trains=False,
    ),
    "gptq": Kind("gptqmodel", _replaced(_packed(awq=False)), lambda layer: layer.dequantize_weight().T),
    "awq": Kind("gptqmodel", _replaced(_packed(awq=True)), _awq_weight, rounds=True),
}
