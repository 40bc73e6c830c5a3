"""The router: its layers' places, its shapes, its precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from loramix import XLoraClassifier, XLoraConfig
from loramix.routers import RouterSizes

H, E, L, SIZE = 8, 3, 5, 16


def classifier(**config: object) -> XLoraClassifier:
    settings = {"hidden_size": H, "adapters": {}, "xlora_size": SIZE, **config}
    return XLoraClassifier(XLoraConfig(**settings), n_classes=E, n_layers=L).eval()


@pytest.mark.parametrize(
    ("depth", "dropout", "places"),
    [(1, 0.2, [0]), (2, 0.2, [0, 3]), (4, 0.2, [0, 3, 6, 9]), (1, 0.0, [0]), (2, 0.0, [0, 2]), (3, 0.0, [0, 2, 4])],
)
def test_the_places_of_the_linear_layers_are_those_of_the_file_format(
    depth: int, dropout: float, places: list[int]
) -> None:
    router = classifier(xlora_depth=depth, xlora_dropout_p=dropout)
    names = [f"layers.{place}.{part}" for place in places for part in ("weight", "bias")]
    assert list(router.state_dict()) == names
    between = [nn.ReLU, nn.Dropout] if dropout else [nn.ReLU]
    assert [type(layer) for layer in router.layers] == [*([nn.Linear, *between] * (depth - 1)), nn.Linear]
    widths = [H, *[SIZE] * (depth - 1), E]
    assert [router.layers[place].weight.shape for place in places] == [*zip(widths[1:], widths, strict=False)]


PARTS = [{}, {"use_bias": False}, {"enable_relu_and_dropout": False}]


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_its_tensors_are_known_without_building_it(depth: int, dropout: float, layerwise: bool, parts: Any) -> None:
    router = classifier(xlora_depth=depth, xlora_dropout_p=dropout, layerwise_scalings=layerwise, **parts)
    shapes = {name: tuple(tensor.shape) for name, tensor in router.state_dict().items()}
    assert XLoraClassifier.shapes(router.config, RouterSizes(router.hidden_size, L, E)) == shapes


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_the_logits_are_those_of_the_layers_one_after_the_other(depth: int, parts: Any) -> None:
    router, hidden = classifier(xlora_depth=depth, **parts), torch.randn(2, 4, H)
    linear = [layer for layer in router.layers if isinstance(layer, nn.Linear)]
    z = hidden
    for i, layer in enumerate(linear):
        z = z @ layer.weight.T + (layer.bias if parts.get("use_bias", True) else 0)
        z = torch.relu(z) if i < depth - 1 and parts.get("enable_relu_and_dropout", True) else z
    assert_close(router(hidden), z.unsqueeze(2).expand(2, 4, L, E))


def test_shared_logits_are_one_for_all_layers_and_layerwise_ones_differ() -> None:
    hidden = torch.randn(2, 4, H)
    shared, own = classifier()(hidden), classifier(layerwise_scalings=True)
    assert shared.shape == own(hidden).shape == (2, 4, L, E)
    assert (shared == shared[:, :, :1]).all()
    assert classifier().distinct(hidden).shape == (2, 4, 1, E)
    assert_close(own(hidden)[:, :, 3, 1], own.layers(hidden)[..., 3 * E + 1])  # layers first, then experts
    assert not torch.allclose(own(hidden)[:, :, 0], own(hidden)[:, :, 1])


def test_dropout_acts_in_training_only() -> None:
    router, hidden = classifier(xlora_depth=2, xlora_dropout_p=0.5), torch.randn(1, 2, H)
    assert torch.equal(router(hidden), router(hidden))
    router.train()
    assert not torch.equal(router(hidden), router(hidden))


def test_parameters_and_computation_are_float32() -> None:
    router, hidden = classifier(xlora_depth=2), torch.randn(2, 4, H)
    expected = router(hidden.bfloat16().float())
    router.to(torch.bfloat16).half()
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = router(hidden.bfloat16())
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_a_width_of_its_own_goes_before_the_configurations() -> None:
    config = XLoraConfig(hidden_size=H, adapters={})
    assert XLoraClassifier(config, n_classes=E, n_layers=L, hidden_size=4).layers[0].in_features == 4
    assert XLoraClassifier(config, n_classes=E, n_layers=L).config is config
