"""What a dry run tells of a base model's layers, and what is refused by it."""

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

from loramix import LoraConfig, PeftModel, RoutingError, UnsupportedAdapterError, XLoraConfig, get_peft_model
from loramix.experts import dry_run as module
from loramix.experts.dry_run import dry_run
from loramix.experts.layer_use import TEXTS, TOKENS
from support.convolution import tiny_convolution
from support.refusals import refused
from support.tiny import ARCHITECTURES, BLOCKS, GATED, SPECIAL, build, llama, save_expert, tokens
from support.versions import needs_transformers

Experts = Callable[[str], dict[str, str]]
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
BART: dict[str, Any] = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}
SPEECH: dict[str, Any] = {
    **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    "vocab_size": 96,
    "d_model": 256,
    "pad_token_id": 0,
}
MAKE: dict[str, Callable[[], Any]] = {
    "bert": lambda: build(hf.BertModel, **{**BLOCKS, "intermediate_size": 128}),
    "deepseek": lambda: build(hf.DeepseekV3Model, **{**GATED, "num_key_value_heads": 4, **LATENT}),
    "xlnet": lambda: build(hf.XLNetModel, vocab_size=96, d_model=64, n_layer=2, n_head=4, d_inner=96),
    "t5": lambda: (
        build(hf.T5EncoderModel, vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4).encoder
    ),
    "bart": lambda: build(hf.BartForCausalLM, vocab_size=96, **BART).model.decoder,
    "mamba": lambda: build(hf.MambaModel, **{**SPECIAL, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "llama4": lambda: build(hf.Llama4ForCausalLM, **{**GATED, "num_local_experts": 2, "head_dim": 16}).model,
    "bigbird": lambda: build(hf.BigBirdModel, **{**BLOCKS, "intermediate_size": 128}, attention_type="original_full"),
    "vit": lambda: build(hf.ViTModel, **{**BLOCKS, "intermediate_size": 96, "image_size": 16, "patch_size": 4}),
    "whisper": lambda: build(hf.WhisperModel, **SPEECH, max_source_positions=16).encoder,
    "speech2text": lambda: build(hf.Speech2TextModel, **SPEECH, conv_channels=256).encoder,
    "wav2vec2": lambda: build(
        hf.Wav2Vec2Model, **{**BLOCKS, "intermediate_size": 96}, conv_dim=[32], conv_kernel=[400], conv_stride=[320]
    ),
    "siglip2": lambda: build(hf.Siglip2VisionModel, **{**BLOCKS, "intermediate_size": 96}, patch_size=4),
    "convnext": lambda: build(hf.ConvNextModel, hidden_sizes=[16, 32], depths=[1, 1], num_stages=2).encoder,
}
ODD: dict[str, dict[str, str]] = {  # the layers, by the ends of their paths, that see other tokens than the backbone
    "bert": {"position_embeddings": "other tokens", "pooler.dense": "other tokens"},
    "deepseek": {"kv_b_proj": "cached tokens"},
    "xlnet": {},
    "t5": {"relative_attention_bias": "other tokens"},
    "bart": {"encoder_attn.k_proj": "encoder tokens", "encoder_attn.v_proj": "encoder tokens"},
    "mamba": {"dt_proj": "nothing", "conv1d": "nothing"},
    "llama4": {},
    "bigbird": {"position_embeddings": "other tokens", "pooler": "other tokens"},
    "vit": {"projection": "other tokens", "pooler.dense": "other tokens"},
    "whisper": {"conv1": "other tokens", "embed_positions": "other tokens"},
    "speech2text": {"conv_layers.0": "other tokens"},
    "wav2vec2": {"pos_conv_embed.conv": "other tokens"},
    "siglip2": {
        "position_embedding": "nothing",
        "head.attention.out_proj": "nothing",
        "head.mlp.fc1": "other tokens",
        "head.mlp.fc2": "other tokens",
    },
    "convnext": {"stages.0.layers.0.dwconv": "other tokens", "pwconv1": "other tokens", "pwconv2": "other tokens"},
}


READS = needs_transformers(5, 15, "Mamba calls its dt_proj")
CACHED = needs_transformers(5, 17, "attention caches other values, and cross-attention takes other states")
PARTED = needs_transformers(5, 23, "ConvNext's encoder is a model of its own")
SINCE = {"mamba": READS, "deepseek": CACHED, "bart": CACHED, "convnext": PARTED}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SINCE.get(name, ())) for name in MAKE])
def test_what_layers_see(name: str) -> None:
    uses = dry_run(MAKE[name]())
    assert uses
    odd = {path: use.sees for path, use in uses.items() if use.sees != "tokens"}
    assert {end for end in ODD[name] if any(path.endswith(end) for path in odd)} == ODD[name].keys()
    for path, sees in odd.items():
        assert [expected for end, expected in ODD[name].items() if path.endswith(end)] == [sees], path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_usual_models_every_layer_but_positions_sees_the_tokens(architecture: str) -> None:
    uses = dry_run(ARCHITECTURES[architecture]().base_model)
    assert uses
    assert all(
        use.sees == "tokens" for path, use in uses.items() if "wpe" not in path and "embed_positions" not in path
    )


@READS
def test_a_layer_that_is_read_is_told_from_one_that_is_never_used() -> None:
    uses = dry_run(MAKE["mamba"]())
    assert uses
    assert {path.rpartition(".")[2] for path, use in uses.items() if use.is_bypassed} == {"dt_proj", "conv1d"}
    routers = [use for path, use in (dry_run(MAKE["llama4"]()) or {}).items() if path.endswith("router")]
    assert routers
    assert all(use.returns_tuple for use in routers)


def test_the_backbone_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})
    model, calls = llama(), []
    model.register_forward_hook(lambda *_: calls.append("model"))
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    tensors = [*model.parameters(), *model.buffers()]
    before = [(t.data_ptr(), t._version, t.clone()) for t in tensors]
    config, state = model.config.to_dict(), torch.get_rng_state()
    assert dry_run(model.model)
    assert calls == []
    assert [(t.data_ptr(), t._version) for t in tensors] == [(pointer, version) for pointer, version, _ in before]
    assert all(torch.equal(t, kept) for t, (*_, kept) in zip(tensors, before, strict=True))
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_models_of_one_structure_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", {})
    first, again, other = (dry_run(llama(**sizes).model) for sizes in ({}, {}, {"intermediate_size": 64}))
    assert first is again
    assert first is not other


def test_a_large_model_takes_no_memory() -> None:
    with torch.device("meta"):
        model = hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=2)).eval()  # blocks of 7B
        experts = hf.Qwen3MoeModel(hf.Qwen3MoeConfig(num_hidden_layers=2)).eval()  # of 30B
    for large in (model, experts):
        uses = dry_run(large)
        assert uses
        assert {use.sees for use in uses.values()} == {"tokens"}


class Packed(nn.Module):
    """Stands for a quantised layer of another package, which cannot be copied."""

    in_features, out_features, bias = 64, 64, None

    def __deepcopy__(self, memo: object) -> None:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


def test_quantised_layers_are_neither_copied_nor_run() -> None:
    model = llama()
    model.model.layers[0].self_attn.q_proj = Packed()
    uses = dry_run(model.model)
    assert uses
    assert uses["layers.0.self_attn.q_proj"].tokens == [(TEXTS, TOKENS)]


@pytest.mark.parametrize("name", ["t5", "bart", pytest.param("mamba", marks=READS), "llama4"])
def test_a_mixture_is_refused_when_it_is_built(name: str, tmp_path: Path) -> None:
    ends = {"mamba": ["dt_proj"], "llama4": ["router"]}.get(name, list(ODD[name]))
    targets = [path for path, m in MAKE[name]().named_modules() if path.endswith(tuple(ends)) and hasattr(m, "weight")]
    folder = save_by_hand(tmp_path / "expert", MAKE[name](), targets)
    base = MAKE[name]()
    config = XLoraConfig(hidden_size=64, adapters={"one": folder})
    told = refused(UnsupportedAdapterError, base, tmp_path, lambda: get_peft_model(base, config))
    assert repr(targets[0]) in told.received
    assert ends[0].rpartition(".")[2] in told.remedy


def save_by_hand(folder: Path, base: Any, targets: list[str]) -> str:
    """An expert for layers that no expert of ours would be made for."""
    from loramix.experts.adapter import Adapter, LoraWeights
    from loramix.experts.base_layers import expected_shapes
    from loramix.formats import save_adapter

    weights = {}
    for path in targets:
        layer = base.get_submodule(path)
        shapes = expected_shapes(layer, 2)
        weights[path] = LoraWeights(*map(torch.randn, shapes), embedding=isinstance(layer, nn.Embedding))
    save_adapter(folder, Adapter("one", LoraConfig(r=2, target_modules=targets), weights))
    return str(folder)


def test_one_weight_for_all_tokens_needs_no_tokens(tmp_path: Path) -> None:
    base = MAKE["xlnet"]()
    targets = [path for path, _ in base.named_modules() if path.endswith("layer_1")]
    folder = save_by_hand(tmp_path / "one", base, targets)
    model: Any = get_peft_model(base, XLoraConfig(adapters={"one": folder}, router="static")).eval()
    alone: Any = PeftModel.from_pretrained(MAKE["xlnet"](), folder).eval()
    with torch.no_grad():
        found = model(tokens(4, 4)).last_hidden_state
        assert_close(found, alone(tokens(4, 4)).last_hidden_state)
        assert not torch.allclose(found, MAKE["xlnet"]()(tokens(4, 4)).last_hidden_state, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_many_texts_as_tokens_are_mixed_as_each_alone(architecture: str, experts: Experts) -> None:
    config = XLoraConfig(hidden_size=64, adapters=experts(architecture), layerwise_scalings=True)
    model: Any = get_peft_model(ARCHITECTURES[architecture](), config).eval()
    with torch.no_grad():
        model.router.layers[-1].weight.mul_(20)
        square = model(tokens(4, 4)).logits
        rows = torch.cat([model(row[None]).logits for row in tokens(4, 4)])
    assert_close(square, rows, atol=1e-5, rtol=1e-4)


class Shy(hf.LlamaModel):
    """Runs where it may, which a dry run cannot know."""

    allowed = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not Shy.allowed:
            raise RuntimeError("not on this device")
        return super().forward(*args, **kwargs)


def test_where_no_dry_run_is_possible_sizes_must_differ(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    base = llama()
    base.model.__class__ = Shy
    assert dry_run(base.model) is None
    model: Any = get_peft_model(base, XLoraConfig(hidden_size=64, adapters=experts("llama"))).eval()
    other: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama"))).eval()
    other.router.load_state_dict(model.router.state_dict())
    monkeypatch.setattr(Shy, "allowed", True)
    with torch.no_grad():
        assert_close(model(tokens(2, 9)).logits, other(tokens(2, 9)).logits)
        assert model(tokens(1, 1)).logits.shape == (1, 1, 96)
        with pytest.raises(RoutingError, match=r"told by sizes that differ[\s\S]*4 texts of 4 tokens"):
            model(tokens(4, 4))


class Fused(hf.models.llama.modeling_llama.LlamaMLP):
    """As fused kernels do: in training, the weight is read and the layer not called."""

    def forward(self, x: Tensor) -> Tensor:
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return F.linear(inner, self.down_proj.weight) if self.training else self.down_proj(inner)


@pytest.mark.parametrize("router", ["classifier", "static"])
def test_a_weight_that_is_read_in_training_alone_is_an_error_there(router: str, experts: Experts) -> None:
    base: Any = llama()
    base.model.layers[1].mlp.__class__ = Fused
    model: Any = get_peft_model(base, XLoraConfig(hidden_size=64, adapters=experts("llama"), router=router))
    model.eval()(tokens())
    with pytest.raises(RoutingError, match=r"read the weight of 'model.layers.1.mlp.down_proj' without calling"):
        model.train()(tokens())
    model.eval()(tokens())


def test_convolutions_see_the_positions_of_their_output() -> None:
    uses = dry_run(tiny_convolution().model)
    assert uses
    assert {use.sees for use in uses.values()} == {"tokens"}


@READS
def test_a_lone_expert_on_a_weight_that_is_read_is_refused(tmp_path: Path) -> None:
    base = MAKE["mamba"]()
    folder = save_by_hand(tmp_path / "one", base, ["layers.0.mixer.dt_proj"])
    with pytest.raises(UnsupportedAdapterError, match=r"'layers\.0\.mixer\.dt_proj' is not called"):
        PeftModel.from_pretrained(base, folder)
    assert save_expert(tmp_path / "two", base, target_modules=["in_proj"])
