"""Why an expert does not fit a base model: each cause has its own message, and its remedy is followed here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix import errors
from support.mixtures import far, logits_of, mixture
from support.peft_side import PEFT_WARNINGS, lora, write_expert
from support.tiny import build, gemma3, llama, llama4, opt

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Tensors = dict[str, Tensor]


def rewritten(good: str | Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> str:
    shutil.copytree(good, folder)
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    saved = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(saved | config))
    return str(folder)


def keys(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {rename(key): tensor for key, tensor in tensors.items()}


def alone(folder: str, base: Any, **options: Any) -> Tensor:
    """The logits of a mixture of this expert, at the scaling 1."""
    config = loramix.XLoraConfig(hidden_size=64, adapters={"it": folder})
    model: Any = loramix.get_peft_model(base, config, **options).eval()
    with model.fixed_scalings([1.0]):
        return logits_of(model)


def refusal_of(folder: str, base: Any, **options: Any) -> errors.LoramixError:
    with pytest.raises(errors.LoramixError) as caught:
        alone(folder, base, **options)
    assert "'it'" in caught.value.received
    return caught.value


def follow(remedy: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the code that a remedy gives; it saves to the folder "renamed"."""
    code = re.search(r"(from loramix\.formats import .+?); otherwise", remedy)
    assert code
    monkeypatch.chdir(folder)
    exec(code[1], {})
    return str(folder / "renamed")


def gemma3_vision() -> Any:
    text = gemma3().config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build(
        hf.Gemma3ForConditionalGeneration,
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
        boi_token_index=91,
        eoi_token_index=92,
    )


NAMES: dict[str, tuple[Callable[[str], str], str]] = {  # what is changed in keys, and what the message says
    "a wrapper's name in front": (
        lambda key: key.replace(PREFIX, PREFIX + "pretrained_model."),
        "no 'pretrained_model'",
    ),
    "a wrapper's name inside": (lambda key: key.replace(".self_attn.", ".self_attn.inner."), "no 'inner'"),
    "a prefix of PEFT's": (lambda key: key.replace(PREFIX, PREFIX + "model."), "'model.layers.0."),
    "no beginning": (lambda key: key.replace("model.layers", "layers"), "'model.layers.0."),
    "another beginning": (lambda key: key.replace("model.layers", "decoder.blocks"), "'model.layers.0."),
    "another name": (lambda key: key.replace("self_attn", "attention"), "self_attn"),
    "several names": (lambda key: key.replace("q_proj", "q_lin").replace("v_proj", "v_lin"), "q_proj"),
}


@pytest.mark.parametrize("case", NAMES)
def test_other_names(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, said = NAMES[case]
    pattern = {"alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 3}}
    good = write_expert(tmp_path / "good", llama(), target_modules=["q_proj", "v_proj"], **pattern)
    patterns = {change(key): alpha for key, alpha in {r"model.layers.0.self_attn.q_proj": 3}.items()}
    other = rewritten(good, tmp_path / "other", keys(change), alpha_pattern=patterns)
    caught = refusal_of(other, llama())
    assert isinstance(caught, errors.AdapterMismatchError)
    assert said in caught.received
    renamed = follow(caught.remedy, tmp_path, monkeypatch)
    expected = logits_of(lora(llama(), good))
    assert far(expected, logits_of(llama()))
    assert_close(alone(renamed, llama()), expected, atol=1e-5, rtol=1e-5)
    assert_close(logits_of(lora(llama(), renamed)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_expert_of_the_text_model_on_the_one_with_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_expert(tmp_path / "good", gemma3(), target_modules=["q_proj", "v_proj"])
    caught = refusal_of(good, gemma3_vision())
    assert "'model.language_model.layers.0.self_attn.q_proj'" in caught.received
    renamed = follow(caught.remedy, tmp_path, monkeypatch)
    mapping = {r"^model\.layers": "model.language_model.layers"}
    expected = logits_of(lora(gemma3_vision(), good, key_mapping=mapping))
    assert far(expected, logits_of(gemma3_vision()))
    with pytest.warns(UserWarning, match=r"no tensors for 2 of .*vision_tower.*leaves them as they are"):
        assert_close(alone(renamed, gemma3_vision()), expected, atol=1e-5, rtol=1e-5)


def test_another_base_model(tmp_path: Path) -> None:
    """Where no renaming leads there, the base model is named, and loading it helps."""
    llama().save_pretrained(tmp_path / "base")
    own = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    good = write_expert(tmp_path / "good", own, target_modules=["q_proj", "up_proj"])
    for base in (opt(), llama(intermediate_size=96)):
        caught = refusal_of(good, base)
        assert isinstance(caught, errors.AdapterMismatchError)
        call = re.search(r"AutoModelForCausalLM\.from_pretrained\('(.+)'\)", caught.remedy)
        assert call
        assert "loramix.formats" not in caught.remedy
        right = hf.AutoModelForCausalLM.from_pretrained(call[1])
        assert_close(alone(good, right), logits_of(lora(llama(), good)), atol=1e-5, rtol=1e-5)


def test_a_module_for_each_of_a_blocks_experts(tmp_path: Path) -> None:
    """Llama 4 never had them, so that no table of transformers' puts them together."""
    good = write_expert(tmp_path / "good", llama4(), target_modules=["q_proj"])
    place = PREFIX + "model.layers.0.feed_forward.experts.{}.up_proj.lora_{}.weight"
    more = {
        place.format(n, part): torch.ones(4, 64) if part == "A" else torch.ones(128, 4) for n in (0, 1) for part in "AB"
    }
    other = rewritten(good, tmp_path / "other", lambda tensors: tensors | more)
    caught = refusal_of(other, llama4())
    assert "one module for each of a block's experts" in caught.received
    named = re.search(r"target_parameters=(\[.+?\])", caught.remedy)
    assert named
    config = loramix.LoraConfig(target_modules=["q_proj"], target_parameters=json.loads(named[1].replace("'", '"')))
    loramix.get_peft_model(llama4(), config).save_pretrained(tmp_path / "anew")
    assert alone(str(tmp_path / "anew"), llama4()).isfinite().all()
    assert "drop_unsupported=True" in caught.remedy
    with pytest.warns(UserWarning, match=r"'it' 2 parts are left out.*experts\.0\.up_proj"):
        found = alone(other, llama4(), drop_unsupported=True)
    assert_close(found, logits_of(lora(llama4(), good)), atol=1e-5, rtol=1e-5)


def test_saved_rows_of_another_embedding(tmp_path: Path) -> None:
    good = write_expert(tmp_path / "good", llama(), target_modules=["q_proj"])
    name = "model.embed_tokens.weight"
    torch.manual_seed(9)
    rows = {PREFIX + name: torch.randn(96, 64)}
    other = rewritten(good, tmp_path / "other", lambda tensors: tensors | rows)
    caught = refusal_of(other, llama())
    assert "most saved rows have nothing in common" in caught.received
    with pytest.warns(UserWarning, match=rf"'it' 1 parts are left out.*{name}"):
        found = alone(other, llama(), drop_unsupported=True)
    assert_close(found, logits_of(lora(llama(), good)), atol=1e-5, rtol=1e-5)
    path = re.search(r"add '(.+)' to modules_to_save", caught.remedy)
    assert path
    other = rewritten(other, tmp_path / "declared", dict, modules_to_save=[path[1]])
    expected = logits_of(lora(llama(), other))
    assert_close(alone(other, llama()), expected, atol=1e-5, rtol=1e-5)
    assert far(expected, found)


# Pruned modules


def test_modules_that_were_pruned(tmp_path: Path) -> None:
    good = write_expert(tmp_path / "good", llama(), target_modules=["q_proj", "v_proj", "up_proj"])
    dropped = ("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")

    def prune(tensors: Tensors) -> Tensors:
        return {key: tensor for key, tensor in tensors.items() if not any(part in key for part in dropped)}

    pruned = rewritten(good, tmp_path / "pruned", prune)
    zeroed = rewritten(
        good, tmp_path / "zeroed", lambda t: {k: 0 * v if any(p in k for p in dropped) else v for k, v in t.items()}
    )
    with pytest.warns(UserWarning, match=r"'it' has no tensors for 2 of .*layers\.0\.self_attn\.q_proj"):
        found = alone(pruned, llama())
    assert_close(found, logits_of(lora(llama(), zeroed)), atol=1e-5, rtol=1e-5)
    assert far(found, logits_of(lora(llama(), good)))


def test_an_expert_of_a_base_model_with_fewer_blocks(tmp_path: Path) -> None:
    shallow = write_expert(tmp_path / "it", llama(num_hidden_layers=1), target_modules=["q_proj"])
    caught = refusal_of(shallow, llama())
    assert "layers.1.self_attn.q_proj" in caught.received
    assert "layers_to_transform" in caught.remedy
    same = rewritten(shallow, tmp_path / "same", dict, layers_to_transform=[0])
    assert far(alone(same, llama()), logits_of(llama()))


# Biases and trained tokens


def biased() -> Any:
    return build(hf.Qwen2ForCausalLM, **llama().config.to_diff_dict() | {"use_sliding_window": False})


def moved(base: Any) -> Any:
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    return base


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_were_trained(bias: str, tmp_path: Path) -> None:
    import peft

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], bias=bias, task_type="CAUSAL_LM")
    folder = str(tmp_path / "it")
    moved(peft.get_peft_model(biased(), config)).save_pretrained(folder)
    expected = logits_of(lora(biased(), folder))
    plain = rewritten(folder, tmp_path / "plain", lambda t: {k: v for k, v in t.items() if "lora" in k}, bias="none")
    assert far(expected, logits_of(lora(biased(), plain)))
    with pytest.warns(UserWarning, match="the saved rows are used"):
        assert_close(alone(folder, biased()), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="the saved rows are used"):
        model: Any = loramix.PeftModel.from_pretrained(biased(), folder)
    model.save_pretrained(tmp_path / "again")
    assert_close(logits_of(lora(biased(), str(tmp_path / "again"))), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="the saved rows are used"):
        mixed = mixture({"it": folder}, base=biased())
    mixed.fix_routing([1.0])
    mixed.save_fixed(tmp_path / "fixed")
    assert_close(logits_of(lora(biased(), str(tmp_path / "fixed"))), expected, atol=1e-5, rtol=1e-5)


def test_experts_whose_biases_differ(tmp_path: Path) -> None:
    import peft

    folders = {}
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], bias="all")
        model = peft.get_peft_model(biased(), config)
        with torch.no_grad():
            model.base_model.model.model.layers[0].self_attn.k_proj.bias += 1.0 + i
        model.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    config = loramix.XLoraConfig(hidden_size=64, adapters=folders)
    with pytest.raises(errors.AdapterMismatchError, match=r"'model\.layers\.0\.self_attn\.k_proj\.bias'") as caught:
        loramix.get_peft_model(biased(), config)
    assert "drop_unsupported=True" in caught.value.remedy
    with pytest.warns(UserWarning, match=r"left out.*k_proj\.bias"):
        model = loramix.get_peft_model(biased(), config, drop_unsupported=True)
    assert all(map(torch.equal, model.unload().state_dict().values(), biased().state_dict().values()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tokens", [[5, 6], {"embed_tokens": [7, 5]}], ids=str)
def test_tokens_that_were_trained(tokens: Any, tied: bool, tmp_path: Path) -> None:
    import peft

    def base() -> Any:
        return llama(tie_word_embeddings=tied)

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"], trainable_token_indices=tokens)
    model = peft.get_peft_model(base(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter += torch.linspace(-0.5, 0.5, 64)
    folder = str(tmp_path / "it")
    model.save_pretrained(folder)
    ids = torch.tensor([[5, 9, 6, 7, 11, 5]])
    expected = logits_of(lora(base(), folder), ids)
    assert far(
        expected, logits_of(lora(llama(tie_word_embeddings=not tied), folder), ids) if tied else logits_of(base(), ids)
    )
    with pytest.warns(UserWarning, match="the saved rows are used"):
        ours: Any = loramix.PeftModel.from_pretrained(base(), folder)
    assert_close(logits_of(ours, ids), expected, atol=1e-5, rtol=1e-5)
    ours.save_pretrained(tmp_path / "again")
    assert_close(logits_of(lora(base(), str(tmp_path / "again")), ids), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="the saved rows are used"):
        mixed = mixture({"it": folder}, base=base())
    mixed.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(base(), tmp_path / "mixture")
    assert torch.equal(logits_of(again, ids), logits_of(mixed, ids))
    wrong = rewritten(folder, tmp_path / "wrong", dict, trainable_token_indices=[5])
    assert isinstance(refusal_of(wrong, base()), errors.IncompleteCheckpointError)
    lost = rewritten(folder, tmp_path / "lost", lambda t: {key: w for key, w in t.items() if "trainable" not in key})
    assert "trainable_tokens_delta" in refusal_of(lost, base()).received
    beyond = rewritten(folder, tmp_path / "beyond", dict, trainable_token_indices=[5, 97])
    caught = refusal_of(beyond, base())
    assert "base.resize_token_embeddings(98)" in caught.remedy


def test_what_a_mixture_does_not_carry_and_why(tmp_path: Path) -> None:
    good = write_expert(tmp_path / "good", llama(), target_modules=["q_proj"])
    for field, value, why in [
        ("alora_invocation_tokens", [3], "acts only on what follows these tokens"),
        ("layer_replication", [[0, 2], [1, 2]], "repeats blocks"),
        ("use_qalora", True, "average groups"),
    ]:
        folder = rewritten(good, tmp_path / field, dict, **{field: value})
        caught = refusal_of(folder, llama())
        assert isinstance(caught, errors.UnsupportedAdapterError)
        assert f"{field}={value!r}" in caught.received
        assert why in caught.received


# What is left out on demand


def extracted(folder: Path, seed: int) -> str:
    """A LoRA as it is extracted from a tuned model: with norms and a head of its own."""
    good = write_expert(folder / "plain", llama(tie_word_embeddings=False), target_modules=["q_proj"], seed=seed)
    base = llama(tie_word_embeddings=False)
    torch.manual_seed(seed)
    own = {
        f"{PREFIX}{name}": p.detach() + 0.1 * torch.randn_like(p)
        for name, p in base.named_parameters()
        if "norm" in name
    }
    own[f"{PREFIX}lm_head.weight"] = base.lm_head.weight.detach() + 0.1 * torch.randn(96, 64)
    names = [key.removeprefix(PREFIX).removesuffix(".weight") for key in own]
    return rewritten(good, folder / "it", lambda tensors: tensors | own, modules_to_save=names)


def test_norms_and_heads_in_which_experts_differ(tmp_path: Path) -> None:
    def base() -> Any:
        return llama(tie_word_embeddings=False)

    folders = {name: extracted(tmp_path / name, i) for i, name in enumerate(("a", "b"))}
    config = loramix.XLoraConfig(hidden_size=64, adapters=folders)
    with pytest.raises(errors.AdapterMismatchError, match="different rows"):
        loramix.get_peft_model(base(), config)
    with pytest.warns(UserWarning, match="are left out") as told:
        model: Any = loramix.get_peft_model(base(), config, drop_unsupported=True).eval()
    said = [str(warning.message) for warning in told]
    assert len(said) == 2
    assert all(name in text for name in ("model.norm.weight", "lm_head.weight") for text in said)
    for i, name in enumerate(folders):
        with model.fixed_scalings([float(i == n) for n in range(2)]):
            expected = logits_of(lora(base(), str(tmp_path / name / "plain")))
            assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(base(), tmp_path / "mixture")
    assert torch.equal(logits_of(again), logits_of(model))
    model = loramix.get_peft_model(base(), config, drop_unsupported=True, base_weights_of="b").eval()
    with model.fixed_scalings([0.0, 1.0]):
        assert_close(logits_of(model), logits_of(lora(base(), folders["b"])), atol=1e-5, rtol=1e-5)


def test_weights_that_no_base_model_has(tmp_path: Path) -> None:
    """TRL saves the head of a reward beside an expert."""
    good = write_expert(tmp_path / "good", llama(), target_modules=["q_proj"])
    head = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    other = rewritten(good, tmp_path / "other", lambda tensors: tensors | head)
    caught = refusal_of(other, llama())
    assert "'v_head.summary'" in caught.received
    assert "drop_unsupported=True" in caught.remedy
    with pytest.warns(UserWarning, match=r"v_head\.summary\.bias, v_head\.summary\.weight"):
        found = alone(other, llama(), drop_unsupported=True)
    assert_close(found, logits_of(lora(llama(), good)), atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="v_head"):
        model: Any = loramix.PeftModel.from_pretrained(llama(), other, drop_unsupported=True)
    assert_close(logits_of(model), found, atol=1e-5, rtol=1e-5)


def test_a_whole_state_dict_is_an_expert(tmp_path: Path) -> None:
    good = write_expert(tmp_path / "good", llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    expected = logits_of(lora(llama(), good))
    model = lora(llama(), good)
    whole = rewritten(good, tmp_path / "whole", lambda _: {k: t.clone() for k, t in model.state_dict().items()})
    assert any("original_module" in key for key in load_file(Path(whole) / WEIGHTS))
    assert_close(alone(whole, llama()), expected, atol=1e-5, rtol=1e-5)
    saved: Any = loramix.PeftModel.from_pretrained(llama(), whole)
    saved.save_pretrained(tmp_path / "again")
    assert "base_model.model.model.norm.weight" not in load_file(tmp_path / "again" / WEIGHTS)
