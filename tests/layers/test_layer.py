"""Each adapted layer against its equation, with scalings that differ from token to token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from loramix.errors import RoutingError
from loramix.experts.adapter import LoraWeights
from loramix.experts.base_layers import dense_weight, expected_shapes
from loramix.layers.layer import XLoraLayer, adapted_layer, stack_class
from loramix.layers.routing import ConstantRouting, TensorRouting
from loramix.layers.slot import routed
from loramix.layers.stack import LayerExpert
from support.tiny import gemma3

B, S, IN, OUT, V = 2, 5, 6, 4, 11
RANKS, SCALES, GLOBAL = (2, 3, 1), (0.5, 2.0, 1.5), 0.7
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


class Quantised(nn.Module):
    """A linear layer whose weight is no matrix: what is known of it is what it computes."""

    in_features, out_features = IN, OUT

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (OUT * IN,), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(OUT))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.codes.view(OUT, IN).to(x.dtype) / 8, self.bias)


def convolution(*kernel: int) -> nn.Module:
    kinds = (nn.Conv1d, nn.Conv2d)
    return kinds[len(kernel) - 1](IN, OUT, kernel, padding=tuple(k // 2 for k in kernel))


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
    "quantised": Quantised,
    "embedding": lambda: nn.Embedding(V, OUT, padding_idx=0),
    "scaled embedding": lambda: gemma3().get_input_embeddings(),
    "convolution 1d": lambda: convolution(3),
    "convolution 2d": lambda: convolution(3, 1),
}
LINEAR = ["linear", "linear without bias", "Conv1D", "quantised"]
CASES = [
    *((kind, "plain") for kind in BASES),
    *((kind, "bias") for kind in BASES if "embedding" not in kind),
    *((kind, "dora") for kind in LINEAR),
]


def members(base: nn.Module, *, bias: bool = False, dora: bool = False, dropout: float = 0.0) -> list[LayerExpert]:
    """Experts 0, 1 and 3 of four; the second has the bias and the last the magnitude."""
    found = []
    for i, (expert, rank, scale) in enumerate(zip((0, 1, 3), RANKS, SCALES, strict=True)):
        shape_A, shape_B = expected_shapes(base, rank)
        out = shape_B[0]
        weights = LoraWeights(
            torch.randn(shape_A),
            torch.randn(shape_B),
            bias=torch.randn(out) if bias and i == 1 else None,
            magnitude=torch.rand(out) + 0.5 if dora and i == 2 else None,
            embedding=isinstance(base, nn.Embedding),
        )
        found.append(LayerExpert(expert, weights, scale, dropout * i))
    return found


def build(base: nn.Module, experts: list[LayerExpert]) -> XLoraLayer:
    return adapted_layer(base, experts, 0).eval()


def inputs(base: nn.Module) -> Tensor:
    if isinstance(base, nn.Embedding):
        return torch.randint(0, V, (B, S))
    if isinstance(base, nn.Conv1d):
        return torch.randn(B, IN, S)
    return torch.randn(B, IN, S, 1) if isinstance(base, nn.Conv2d) else torch.randn(B, S, IN)


def run(layer: XLoraLayer, x: Tensor, scalings: Tensor) -> Tensor:
    """Scalings (B, S, E), the same in all layers."""
    return routed(TensorRouting(scalings.unsqueeze(2), GLOBAL), layer, x)


def delta(base: nn.Module, x: Tensor, one: LayerExpert) -> Tensor:
    """What one expert adds at scaling 1, from its equation."""
    w, c = one.weights, one.scale
    bias = 0.0 if w.bias is None else w.bias
    if isinstance(base, nn.Embedding):
        return c * F.embedding(x, w.A.T) @ w.B.T * getattr(base, "embed_scale", 1.0)
    if not isinstance(base, nn.Conv1d | nn.Conv2d):
        own = 0.0 if getattr(base, "bias", None) is None else base.bias
        W = (base(torch.eye(IN)) - own).T
        merged = W + c * w.B @ w.A
        if w.magnitude is not None:
            merged = w.magnitude.unsqueeze(1) * merged / merged.norm(dim=1, keepdim=True)
        return x @ (merged - W).T + c * bias
    convolve = F.conv1d if isinstance(base, nn.Conv1d) else F.conv2d
    low = convolve(x, w.A, padding=base.padding)
    shape = (1, -1, *[1] * (x.dim() - 2))
    return c * (convolve(low, w.B) + (bias if w.bias is None else bias.view(shape)))


def tokens_last(base: nn.Module, y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2) if isinstance(base, nn.Conv1d | nn.Conv2d) else y


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(("kind", "extra"), CASES)
def test_a_layer_computes_its_equation_for_each_token(kind: str, extra: str, grad: bool) -> None:
    base = BASES[kind]()
    experts = members(base, bias=extra == "bias", dora=extra == "dora")
    layer, x, s = build(base, experts), inputs(base), torch.randn(B, S, 4)
    with torch.set_grad_enabled(grad):
        plain = tokens_last(base, base(x).clone())
        expected = plain + GLOBAL * sum(s[..., e.expert, None] * tokens_last(base, delta(base, x, e)) for e in experts)
        got = run(layer, x, s)
        assert_close(tokens_last(base, got), expected, **TOLERANCE)
    assert (expected - plain).abs().max() > 1e-2
    assert got.requires_grad == grad or kind == "quantised"


@pytest.mark.parametrize(("kind", "extra"), CASES)
def test_stacked_experts_come_out_as_they_went_in(kind: str, extra: str) -> None:
    base = BASES[kind]()
    experts = members(base, bias=extra == "bias", dora=extra == "dora")
    layer = build(base, experts)
    got = layer.stack.unstack(dict(layer.stack.named_parameters()))
    assert list(got) == [0, 1, 3]
    for member in experts:
        for part in ("A", "B", "bias", "magnitude", "embedding"):
            one, other = getattr(got[member.expert], part), getattr(member.weights, part)
            assert torch.equal(one, other) if isinstance(other, Tensor) else one == other


@pytest.mark.parametrize("kind", BASES)
def test_an_absent_experts_scaling_has_no_effect(kind: str) -> None:
    base = BASES[kind]()
    layer, x, s = build(base, members(base)), inputs(base), torch.randn(B, S, 4)
    expected = run(layer, x, s)
    assert torch.equal(run(layer, x, s + torch.tensor([0.0, 0.0, 5.0, 0.0])), expected)
    assert not torch.allclose(run(layer, x, s + torch.tensor([0.0, 0.0, 0.0, 5.0])), expected)


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(("kind", "extra"), CASES)
def test_what_several_stacks_add_is_summed(kind: str, extra: str, grad: bool) -> None:
    base = BASES[kind]()
    experts = members(base, bias=extra == "bias", dora=extra == "dora")
    together = build(base, experts)
    stacks = [adapted_layer(base, part, 0).stack for part in (experts[2:], experts[:2])]
    apart, x, s = type(together)(base, *stacks).eval(), inputs(base), torch.randn(B, S, 4)
    with torch.set_grad_enabled(grad):
        assert_close(run(apart, x, s), run(together, x, s), **TOLERANCE)


@pytest.mark.parametrize("kind", BASES)
def test_silence_is_the_base_layer_bit_by_bit(kind: str) -> None:
    base = BASES[kind]()
    layer, x = build(base, members(base)), inputs(base)
    assert torch.equal(routed(ConstantRouting(0.0), layer, x), base(x))
    everyone = run(layer, x, torch.full((B, S, 4), 0.3 / GLOBAL))
    assert_close(routed(ConstantRouting(0.3), layer, x), everyone, **TOLERANCE)


def test_tokens_that_the_block_has_flattened_keep_their_scalings() -> None:
    base = BASES["linear"]()
    layer, x, s = build(base, members(base, dora=True)), torch.randn(B, S, IN), torch.randn(B, S, 4)
    assert_close(run(layer, x.flatten(0, 1), s), run(layer, x, s).flatten(0, 1), **TOLERANCE)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("shape", [(B, S + 1, IN), (B + 1, S, IN), (1, S, IN), (B * S + 1, IN), (S, B, IN)], ids=str)
def test_scalings_of_other_tokens_are_never_broadcast(shape: tuple[int, ...], dora: bool) -> None:
    base = BASES["linear"]()
    layer = build(base, members(base, dora=dora))
    with pytest.raises(RoutingError, match=r"scalings for tokens \(2, 5\)"):
        run(layer, torch.randn(shape), torch.randn(B, S, 4))


def test_outside_a_pass_a_layer_does_not_run() -> None:
    base = BASES["linear"]()
    with pytest.raises(RoutingError, match="only inside the passes"):
        build(base, members(base))(torch.randn(B, S, IN))


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
def test_what_a_hook_saw_of_the_base_layer_stays_what_it_saw(grad: bool) -> None:
    base, seen = BASES["linear"](), list[Tensor]()
    layer, x = build(base, members(base)), torch.randn(B, S, IN)
    base.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.set_grad_enabled(grad):
        run(layer, x, torch.ones(B, S, 4))
    assert_close(seen[0], x @ base.weight.T + base.bias, **TOLERANCE)


def test_an_experts_dropout_is_its_own_and_spares_the_base_layer() -> None:
    base, draws = BASES["linear"](), 4000
    layer, x = build(base, members(base, dropout=0.4)), torch.randn(1, 1, IN).expand(draws, 1, IN)
    none, some, more = (F.one_hot(torch.tensor(e), 4).expand(draws, 1, 4).float() for e in (0, 1, 3))
    layer.requires_grad_(False)
    settled = [run(layer, x, s) for s in (none, some, more)]
    layer.train()
    assert_close(run(layer, x, none), settled[0], **TOLERANCE)
    spread = [run(layer, x, s).std(0).mean() for s in (some, more)]
    assert min(spread) > 0.1
    assert_close(run(layer, x, some).mean(0), settled[1][0], atol=6 * float(spread[0]) / draws**0.5, rtol=0.0)
    dropped = [(run(layer, x, s) == layer.base_layer(x)).all(-1).float().mean() for s in (some, more)]
    assert_close(torch.stack(dropped), torch.tensor([0.4**IN, 0.8**IN]), atol=0.03, rtol=0.0)


@pytest.mark.parametrize("kind", LINEAR)
def test_the_dense_weight_is_what_the_layer_multiplies_with(kind: str) -> None:
    base, x = BASES[kind](), torch.randn(3, IN)
    bias = 0.0 if base.bias is None else base.bias
    assert_close(x @ dense_weight(base).T + bias, base(x), **TOLERANCE)


def test_code_of_the_base_model_finds_weight_and_sizes() -> None:
    linear, embedding = BASES["linear"](), BASES["embedding"]()
    layer, table = build(linear, members(linear)), build(embedding, members(embedding))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert table.weight is embedding.weight
    assert (table.num_embeddings, table.embedding_dim) == (V, OUT)


def test_only_known_kinds_of_modules_are_adapted() -> None:
    unknown = [nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 1), nn.Identity(), nn.Sequential(nn.Linear(2, 2))]
    assert {stack_class(module, []) for module in unknown} == {None}


@pytest.mark.parametrize("tokens", [(1, 1), (2, 1), (1, 8)], ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_few_experts_of_many_are_gathered_and_compute_the_same(
    layers: int, tokens: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nn.Linear(IN, OUT)
    experts, rank = 64, 2
    many = [
        LayerExpert(e, LoraWeights(torch.randn(rank, IN), torch.randn(OUT, rank)), 0.5 + e, 0.0) for e in range(experts)
    ]
    layer = build(base, many)
    scalings = torch.zeros(*tokens, layers, experts)
    scalings[..., layers - 1, [3, 40]] = torch.randn(*tokens, 2)
    number = torch.zeros(1) if layers == 1 else torch.ones(1)
    layer.stack.number = int(number)
    x = torch.randn(*tokens, IN)
    with torch.no_grad():
        routing = TensorRouting(scalings, GLOBAL, [layer.stack])
        found = routed(routing, layer, x)
        gathered = routing.gathered(layer.stack)
        assert gathered is not None
        assert gathered.ranks.tolist() == [6, 7, 80, 81]
        monkeypatch.setattr("loramix.layers.routing.GATHERED_RANKS", 1000)
        every = TensorRouting(scalings, GLOBAL, [layer.stack])
        assert every.gathered(layer.stack) is None
        assert_close(found, routed(every, layer, x), **TOLERANCE)


@pytest.mark.parametrize("tokens", [3, 3000])
def test_a_base_layer_that_returns_float32_under_autocast(tokens: int) -> None:
    class Precise(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(input)

    layer = build(nn.Linear(IN, OUT), members(nn.Linear(IN, OUT)))
    layer.base_layer.__class__ = Precise
    x, routing = torch.randn(1, tokens, IN), TensorRouting(torch.rand(1, tokens, 1, 4))
    with torch.no_grad():
        expected = routed(routing, layer, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = routed(routing, layer, x)
    assert found.dtype == torch.float32
    assert_close(found, expected, atol=0.1, rtol=0.05)


def test_experts_are_gathered_only_where_nearly_all_scalings_are_zero() -> None:
    base = nn.Linear(IN, OUT)
    many = [LayerExpert(e, LoraWeights(torch.randn(2, IN), torch.randn(OUT, 2)), 1.0, 0.0) for e in range(64)]
    layer = build(base, many)

    def gathers(scalings: Tensor) -> bool:
        return TensorRouting(scalings, 1.0, [layer.stack]).gathered(layer.stack) is not None

    few, more, apart, dense, long = (torch.zeros(1, s, 1, 64) for s in (1, 1, 8, 1, 9))
    few[..., :2] = long[..., :2] = more[..., :3] = 0.5
    apart[0, range(8), 0, range(8)] = 1.0  # each token has an expert of its own: together they need eight
    dense[:] = 1 / 64
    with torch.no_grad():
        chosen = [gathers(scalings) for scalings in (few, more, apart, dense, long)]
        assert chosen == [True, False, False, False, False]
        layer.bfloat16()
        assert not gathers(few)
        layer.float()
    assert not gathers(few)  # gradients
