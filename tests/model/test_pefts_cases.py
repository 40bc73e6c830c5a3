"""The cases of PEFT's own tests of X-LoRA, written anew: the names in `docs/peft.md` are theirs.

PEFT 0.21.2, tests/test_xlora.py: four experts on q_proj and v_proj, one of them on k_proj too, on an OPT without cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loramix
from loramix import LoraConfig, PeftModel, PeftType, TaskType, XLoraConfig, get_peft_model
from loramix.errors import ConfigurationError
from loramix.layers.layer import XLoraLayer
from support.mixtures import final_scalings
from support.tiny import gemma3, opt, tokens

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
PROMPT, NEW = 3, 32
ON_ATTENTION = ["q_proj", "v_proj"]


def save_four(folder: Path, make: Any = opt, targets: Any = None) -> dict[str, str]:
    folders: dict[str, str] = {}
    for number in range(4):
        torch.manual_seed(number + 1)
        own = targets or ([*ON_ATTENTION, "k_proj"] if number == 3 else ON_ATTENTION)
        expert = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", target_modules=own, init_lora_weights=False))
        expert.save_pretrained(folder / f"checkpoint-{number + 1}")
        folders[str(number)] = str(folder / f"checkpoint-{number + 1}")
    return folders


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_four(tmp_path_factory.mktemp("four"))


def make(adapters: dict[str, str], base: Any = None, **config: Any) -> Any:
    base = base or opt()
    base.config.use_cache = False
    torch.manual_seed(5)
    settings = XLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        peft_type=PeftType.XLORA,
        hidden_size=base.config.hidden_size,
        xlora_depth=8,
        adapters=adapters,
        **config,
    )
    return get_peft_model(base, settings).eval()


def generated(model: Any, new: int = NEW, **options: Any) -> Tensor:
    lengths = {"min_new_tokens": new, "max_new_tokens": new}
    return model.generate(input_ids=tokens(1, PROMPT), do_sample=False, **lengths, **options)


def test_functional(adapters: dict[str, str]) -> None:
    model = make(adapters)
    model.enable_scalings_logging()
    assert generated(model).shape == (1, PROMPT + NEW)


def test_forward_hooks_are_cleaned_up(adapters: dict[str, str]) -> None:
    model = make(adapters)
    for _ in range(2):
        generated(model, 10)
        layer = model.base_model.model.model.decoder.layers[0].self_attn.k_proj
        assert len(layer._forward_pre_hooks) == 0


def test_scalings_logging_methods(adapters: dict[str, str]) -> None:
    """Differs by design: `generate` uses a cache unless it is told not to, so each later entry is of one token."""
    model = make(adapters)
    model.enable_scalings_logging()
    generated(model, use_cache=False)
    model.disable_scalings_logging()
    generated(model)
    assert len(model.get_scalings_log()) == NEW
    buckets = model.get_bucketed_scalings_log()
    assert {length: places for length, (places, _) in buckets.items()} == {PROMPT + i: [i] for i in range(NEW)}
    model.clear_scalings_log()
    assert model.get_scalings_log() == []


def test_misc_methods(adapters: dict[str, str]) -> None:
    model = make(adapters)
    before = model(tokens()).logits
    model.set_global_scaling_weight(1.5)
    assert model.internal_xlora_classifier.config.global_scaling_weight == model.get_global_scaling_weight() == 1.5
    assert not torch.equal(model(tokens()).logits, before)
    assert "internal_xlora_classifier" in str(model)


def test_save_load_functional(adapters: dict[str, str], tmp_path: Path) -> None:
    model = make(adapters)
    before = generated(model)
    model.save_pretrained(save_directory=tmp_path)
    base = opt()
    base.config.use_cache = False
    assert torch.equal(generated(PeftModel.from_pretrained(model=base, model_id=tmp_path)), before)


def test_save_load_functional_pt(adapters: dict[str, str], tmp_path: Path) -> None:
    """Differs by design: pickles are read, never written."""
    model = make(adapters)
    with pytest.raises(ConfigurationError, match="saved as safetensors"):
        model.save_pretrained(save_directory=tmp_path, safe_serialization=False)
    model.save_pretrained(save_directory=tmp_path)
    loaded = PeftModel.from_pretrained(model=opt(), model_id=tmp_path, safe_serialization=False)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_topk_lora(adapters: dict[str, str]) -> None:
    model = make(adapters)
    model.set_topk_lora(2)
    assert model.internal_xlora_classifier.config.top_k_lora == 2
    assert (final_scalings(model) != 0).sum(-1).unique().tolist() == [2]


def _sparse(model: Any) -> None:
    config = model.internal_xlora_classifier.config
    config.top_k_lora, config.enable_softmax, config.enable_softmax_topk = 2, False, True


def test_softmax_topk(adapters: dict[str, str]) -> None:
    model = make(adapters)
    dense = model(tokens()).logits
    _sparse(model)
    assert not torch.equal(model(tokens()).logits, dense)


def test_set_override_scaling_pass_value(adapters: dict[str, str]) -> None:
    model = make(adapters)
    classifier = model.internal_xlora_classifier
    assert classifier.override_scaling_pass_value == 0.0
    for value, expected in [(2, 2), (None, 1 / 4)]:
        model.set_scaling_pass_value(value)
        assert classifier.override_scaling_pass_value == classifier.config.scaling_pass_value == expected


def test_functional_layerwise(adapters: dict[str, str]) -> None:
    model = make(adapters, layerwise_scalings=True)
    model.enable_scalings_logging()
    generated(model)
    assert model.get_scalings_log()[0].unique(dim=2).shape[2] == len(model.adapted_modules)


def test_disable_adapter(adapters: dict[str, str]) -> None:
    model = make(adapters)
    model.enable_scalings_logging()
    with model.disable_adapter():
        disabled = model(tokens()).logits
    assert torch.equal(disabled, opt()(tokens()).logits)
    assert not torch.equal(model(tokens()).logits, disabled)


def test_functional_embedding(tmp_path: Path) -> None:
    model = make(save_four(tmp_path, targets=["embed_tokens"]))
    assert generated(model).shape == (1, PROMPT + NEW)


def test_xlora_loading_valid(adapters: dict[str, str]) -> None:
    """Differs by design: a layer holds the matrices of its experts stacked, and no `lora_A` by adapter."""
    model = make(dict.fromkeys("01", adapters["0"]), layerwise_scalings=True, xlora_size=64, xlora_dropout_p=0.2)
    layer = model.base_model.model.model.decoder.layers[0].self_attn.q_proj
    saved = load_file(Path(adapters["0"]) / "adapter_model.safetensors")
    for part in layer.stack.parts.values():
        assert torch.equal(part.A, saved["base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"])
    assert not hasattr(layer, "lora_A")


def test_scalings_storage(adapters: dict[str, str]) -> None:
    model = make(adapters)
    model.enable_scalings_logging()
    generated(model, 10)
    latest = model.get_latest_scalings()
    assert latest is not None
    assert torch.isfinite(latest).all()


def test_per_token_normalization_with_softmax_topk(adapters: dict[str, str]) -> None:
    """Differs by design: gating is no method of a layer that could be replaced. The law is the same."""
    model = make(adapters)
    _sparse(model)
    assert not hasattr(XLoraLayer, "get_maybe_topk_scalings")
    sums = final_scalings(model).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_xlora_embed_scale_is_applied(tmp_path: Path) -> None:
    folders = save_four(tmp_path, gemma3, targets=["embed_tokens"])
    base: Any = gemma3()
    scale = base.get_input_embeddings().embed_scale
    model = make(folders, base)
    embedding = model.base_model.model.get_input_embeddings()
    with model.fixed_scalings([1.0, 0.0, 0.0, 0.0]):
        found = model(tokens()).logits
    assert found.isfinite().all()

    def largest() -> float:
        seen: list[Tensor] = []
        handle = embedding.register_forward_hook(lambda *args: seen.append(args[-1]))
        model(tokens())
        handle.remove()
        return float(seen[-1].detach().abs().max())

    before = largest()
    scale.mul_(1000)
    assert largest() == pytest.approx(1000 * before, rel=1e-4)
    scale.fill_(0)
    assert largest() == 0


def test_the_page_names_every_case() -> None:
    """Each with "passes", or with why it differs, as the test here says by its docstring."""
    rows = dict(re.findall(r"^\| `(test_\w+)` \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.M))
    own = {n: f for n, f in globals().items() if n.startswith("test_") and n != "test_the_page_names_every_case"}
    assert rows.keys() == own.keys()
    assert len(rows) == 16
    differing = {name for name, said in rows.items() if said != "passes"}
    assert differing == {name for name, test in own.items() if (test.__doc__ or "").startswith("Differs by design")}
    assert loramix.PeftModel is PeftModel
