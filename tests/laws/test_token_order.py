"""Layers that hold the tokens of the backbone in another order: tokens first, or followed by padding.

B, S: batch, sequence. n: tokens of a text with its padding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.testing import assert_close

from loramix import UnsupportedAdapterError, get_peft_model
from loramix.analysis import record_routing
from loramix.config.xlora import XLoraConfig
from loramix.experts.adapter import LoraWeights
from loramix.experts.dry_run import dry_run
from loramix.experts.layer_use import TokenOrder
from loramix.formats import load_adapter
from support.mixtures import far, mixture
from support.routers import EnergyRouter
from support.tiny import build, llama, save_expert, tokens

SIDES: dict[str, Any] = {
    f"{side}_{part}": n
    for side in ("encoder", "decoder")
    for part, n in (("layers", 2), ("ffn_dim", 96), ("attention_heads", 4))
}
WINDOW = 8
LONGFORMER: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LONGFORMER |= {"intermediate_size": 96, "attention_window": [WINDOW, WINDOW], "max_position_embeddings": 64}
LED: dict[str, Any] = {"vocab_size": 96, "d_model": 64, **SIDES, "attention_window": WINDOW}
LED |= {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
XLNET: dict[str, Any] = {"vocab_size": 96, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96}
BIGBIRD: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BIGBIRD |= {"intermediate_size": 96, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
BIGBIRD |= {"max_position_embeddings": 64}
MAKE: dict[str, Callable[[], Any]] = {
    "longformer": lambda: build(hf.LongformerForMaskedLM, **LONGFORMER),
    "led": lambda: build(hf.LEDForConditionalGeneration, **LED),
    "xlnet": lambda: build(hf.XLNetLMHeadModel, **XLNET),
    "bigbird": lambda: build(hf.BigBirdForMaskedLM, **BIGBIRD),
}
TARGETS = {
    "longformer": ["word_embeddings", "query", "key", "value", "output.dense"],
    "led": ["query", "key", "value", "longformer_self_attn.output", "self_attn.output", "q_proj", "v_proj", "fc1"],
    "xlnet": ["word_embedding", "layer_1", "layer_2"],
    "bigbird": ["word_embeddings", "query", "key", "value", "output.dense"],
}
TOKENS_FIRST = {  # by reading the models' code
    "longformer": ("self.query", "self.key", "self.value"),
    "led": ("longformer_self_attn.query", "longformer_self_attn.key", "longformer_self_attn.value"),
    "xlnet": ("word_embedding", "layer_1", "layer_2"),
    "bigbird": (),
}
CLOSE: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}
SIZES = [(2, 5), (5, 5), (8, 5), (3, 8), (2, 11), (2, 33)]
"""B and S: also as many texts as tokens, as tokens with padding; without padding; long enough for BigBird to pad."""


def two_experts(folder: Path, base: Any, targets: list[str]) -> dict[str, str]:
    ranks = {"a": 2, "b": 3}
    return {n: save_expert(folder / n, base, seed=r, r=r, target_modules=targets) for n, r in ranks.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    known: dict[str, dict[str, str]] = {}

    def of(name: str) -> dict[str, str]:
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            known[name] = two_experts(folder, MAKE[name](), TARGETS[name])
        return known[name]

    return of


Folders = Callable[[str], dict[str, str]]


def mixed(name: str, folders: Folders, **config: Any) -> Any:
    return mixture(folders(name), base=MAKE[name](), **{"layerwise_scalings": True, **config})


def inputs_of(name: str, rows: int, length: int) -> dict[str, Tensor]:
    found = {"input_ids": tokens(rows, length)}
    return found | {"decoder_input_ids": tokens(rows, 4, seed=2)} if name == "led" else found


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize(("rows", "length"), SIZES)
@pytest.mark.parametrize("name", MAKE)
def test_each_token_is_gated_by_its_own_scalings(name: str, rows: int, length: int, folders: Folders) -> None:
    """A forward of the plain base model, to whose layers hooks add each expert, token by token."""
    model, inputs = mixed(name, folders), inputs_of(name, rows, length)
    model.enable_scalings_logging()
    found = logits(model, inputs)
    of_encoder, of_main = model.get_scalings_log()[0], model.get_scalings_log()[-1]  # (B, S, L, E)
    base, experts = MAKE[name](), [load_adapter(n, f) for n, f in folders(name).items()]
    for number, path in enumerate(model.adapted_modules):
        scalings = of_encoder if ".encoder." in path or path.endswith("encoder_attn.v_proj") else of_main

        def add(layer: nn.Module, args: Any, y: Tensor, n: int = number, s: Tensor = scalings, p: str = path) -> Tensor:
            by_text = y.clone().transpose(0, 1) if p.endswith(TOKENS_FIRST[name]) else y.clone()
            x = args[0].transpose(0, 1) if p.endswith(TOKENS_FIRST[name]) else args[0]
            for text in range(s.shape[0]):
                for token in range(s.shape[1]):
                    for e, expert in enumerate(experts):
                        delta = expert.scaling(p) * _update(expert.weights[p], x[text, token])
                        by_text[text, token] += s[text, token, n, e] * delta
            return by_text.transpose(0, 1) if p.endswith(TOKENS_FIRST[name]) else by_text

        base.get_submodule(path).register_forward_hook(add)
    assert_close(found, logits(base, inputs), **CLOSE)
    assert far(found, logits(MAKE[name](), inputs))


def _update(weights: LoraWeights, x: Tensor) -> Tensor:
    return weights.B @ (weights.A[:, x] if weights.embedding else weights.A @ x)


@pytest.mark.parametrize("router", ["classifier", "static", EnergyRouter.kind])
@pytest.mark.parametrize("name", MAKE)
def test_texts_are_mixed_as_each_alone(name: str, router: str, folders: Folders) -> None:
    model = mixed(name, folders, router=router)
    inputs = inputs_of(name, 5, 5)
    alone = [logits(model, {key: value[row : row + 1] for key, value in inputs.items()}) for row in range(5)]
    assert_close(logits(model, inputs), torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("name", MAKE)
def test_gradients_and_records(name: str, folders: Folders) -> None:
    model, inputs = mixed(name, folders), inputs_of(name, 3, 6)
    model.train()
    model(**inputs).logits.float().square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.router.parameters())
    model.eval()
    with record_routing(model) as record:
        logits(model, inputs)
    assert record.scalings.shape[0] == inputs["input_ids"].numel() + (3 * 4 if name == "led" else 0)


def test_orders_that_a_dry_run_tells() -> None:
    orders = {path: use.order for path, use in (dry_run(MAKE["longformer"]().base_model) or {}).items()}
    padded, tokens_first = TokenOrder(padded=True), TokenOrder(tokens_first=True, padded=True)
    assert orders["encoder.layer.0.output.dense"] == padded
    assert orders["encoder.layer.1.attention.self.key"] == tokens_first


@pytest.mark.parametrize("order", [TokenOrder(a, b) for a in (False, True) for b in (False, True)])
@pytest.mark.parametrize("flat", [False, True])
def test_an_order_has_its_reverse(order: TokenOrder, flat: bool) -> None:
    values, count = torch.rand(3, 5, 4, 2), 8 if order.padded else 5
    sizes = torch.Size(order.sizes(3, count)[int(flat)])
    fitted = order.fit(values.flatten(2), sizes)
    assert fitted.shape == (*sizes, 8)
    assert torch.equal(order.by_text(fitted.unflatten(-1, (4, 2)), 3)[:, :5], values)


Move = Callable[[Tensor], Tensor]
Back = Callable[[Tensor, Tensor], Tensor]


class Moving(hf.LlamaModel):
    """Has one more layer, which sees the tokens as `move` has placed them; `back` takes the output and the states."""

    move: Move
    back: Back

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Linear(64, 64, bias=False)

    def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids, use_cache=use_cache, **kwargs)
        hidden = out.last_hidden_state
        out.last_hidden_state = hidden + type(self).back(self.extra(type(self).move(hidden)), hidden)
        return out


def moving(move: Move, back: Back) -> Any:
    torch.manual_seed(0)
    base = llama()
    base.model = type("Moving", (Moving,), {"move": staticmethod(move), "back": staticmethod(back)})(base.config)
    return base.eval()


def missing(x: Tensor) -> int:
    """Tokens up to the next multiple of 16."""
    return -x.shape[1] % 16


REFUSED: dict[str, tuple[Move, Back]] = {
    "backwards": (lambda x: x.flip(1), lambda y, _: y.flip(1)),
    "backwards and flattened": (lambda x: x.flip(1).flatten(0, 1), lambda y, x: y.view_as(x).flip(1)),
    "texts in another order": (lambda x: x.flip(0), lambda y, _: y.flip(0)),
    "shifted": (lambda x: x.roll(1, 1), lambda y, _: y.roll(-1, 1)),
    "three streams": (lambda x: torch.cat([x, x.flip(1), x], 1), lambda y, x: y[:, : x.shape[1]]),
    "after a prefix": (lambda x: F.pad(x, (0, 0, 4, 0)), lambda y, _: y[:, 4:]),
    "before a suffix": (lambda x: F.pad(x, (0, 0, 0, 4)), lambda y, _: y[:, :-4]),
    "padded on the left": (lambda x: F.pad(x, (0, 0, missing(x), 0)), lambda y, x: y[:, -x.shape[1] :]),
}
ACCEPTED: dict[str, tuple[Move, Back]] = {
    "tokens first": (lambda x: x.transpose(0, 1), lambda y, _: y.transpose(0, 1)),
    "tokens first and flattened": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda y, x: y.view_as(x.transpose(0, 1)).transpose(0, 1),
    ),
    "padded": (lambda x: F.pad(x, (0, 0, 0, missing(x))), lambda y, x: y[:, : x.shape[1]]),
    "padded and flattened": (
        lambda x: F.pad(x, (0, 0, 0, missing(x))).flatten(0, 1),
        lambda y, x: y.view(len(x), -1, 64)[:, : x.shape[1]],
    ),
}


@pytest.mark.parametrize("moved", REFUSED)
def test_tokens_that_no_scalings_are_made_for_in_their_order(moved: str, tmp_path: Path) -> None:
    base = moving(*REFUSED[moved])
    folders = two_experts(tmp_path, base, ["extra", "q_proj"])
    with pytest.raises(UnsupportedAdapterError, match=r"'model\.extra' sees"):
        get_peft_model(base, XLoraConfig(hidden_size=64, adapters=folders))


@pytest.mark.parametrize("config", [{}, {"layerwise_scalings": True}, {"router": "static"}], ids=str)
@pytest.mark.parametrize("moved", ACCEPTED)
def test_an_order_does_not_change_the_numbers(moved: str, config: dict[str, Any], tmp_path: Path) -> None:
    plain = moving(lambda x: x, lambda y, _: y)
    folders = two_experts(tmp_path, plain, ["extra", "q_proj"])
    one, other = (mixture(folders, base=base, **config) for base in (plain, moving(*ACCEPTED[moved])))
    for rows, length in [(2, 5), (5, 5), (3, 16), (16, 16), (1, 1)]:
        inputs = {"input_ids": tokens(rows, length)}
        assert_close(logits(other, inputs), logits(one, inputs), **CLOSE)
    assert torch.equal(*(m.generate(tokens(2, 5), max_new_tokens=4, do_sample=False) for m in (one, other)))


def test_layer_routers_make_scalings_by_text(tmp_path: Path) -> None:
    """A router of the layers' own activations sees the tokens of each layer in the layer's order."""
    plain = moving(lambda x: x, lambda y, _: y)
    folders = two_experts(tmp_path, plain, ["extra", "q_proj"])
    made = []
    for move, back in [(lambda x: x, lambda y, _: y), *ACCEPTED.values()]:
        model = mixture(folders, base=moving(move, back), router=EnergyRouter.kind)
        model.enable_scalings_logging()
        logits(model, {"input_ids": tokens(4, 4)})
        made.append(model.get_scalings_log()[0])
    for scalings in made[1:]:
        assert_close(scalings, made[0], **CLOSE)
