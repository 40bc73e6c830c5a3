"""Embeddings and heads that PEFT saves with an expert: the mixture computes what PEFT does with the same file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix.errors import AdapterMismatchError, ConfigurationError, UnsupportedAdapterError
from support.checkpoints import edit_tensors
from support.mixtures import far, logits_of
from support.peft_side import PEFT_WARNINGS, lora, ours
from support.tiny import BLOCKS, SPECIAL, build, gpt2, llama, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

V, NEW = 96, 100
USED = "the saved rows are used, for all experts"


def pythia() -> Any:
    return build(transformers.GPTNeoXForCausalLM, **BLOCKS, intermediate_size=128, tie_word_embeddings=False)


def bloom() -> Any:
    return build(transformers.BloomForCausalLM, **SPECIAL, hidden_size=64, n_layer=2, n_head=4)


def untied() -> Any:
    return llama(tie_word_embeddings=False)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def resized(make: Callable[[], Any], seed: int = 3) -> Callable[[], Any]:
    def base() -> Any:
        model = make()
        torch.manual_seed(seed)
        model.resize_token_embeddings(NEW, mean_resizing=False)
        return model.eval()

    return base


def write(folder: Path, base: Any, change: Callable[[Tensor], Any] = lambda _: None, **config: Any) -> str:
    """An expert as PEFT saves it, with its embeddings, after a change to the input embedding."""
    settings = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    torch.manual_seed(1)
    model = peft.get_peft_model(base, peft.LoraConfig(**settings))
    with torch.no_grad():
        change(model.get_input_embeddings().weight)
    model.save_pretrained(folder, save_embedding_layers=True)
    return str(folder)


def bend(weight: Tensor) -> None:
    """A change of the new rows that no norm takes out again."""
    weight[V:] += torch.linspace(-1, 1, weight.shape[1])


def new_tokens() -> Tensor:
    ids = tokens(2, 9)
    ids[:, ::3] = torch.tensor([97, 98, 99])
    return ids


def alone(model: Any, expert: int = 0, ids: Tensor | None = None) -> Tensor:
    with model.fixed_scalings([float(i == expert) for i in range(len(model.expert_names))]):
        return logits_of(model, new_tokens() if ids is None else ids)


def theirs(base: Any, folder: str, ids: Tensor | None = None) -> Tensor:
    return logits_of(lora(base, folder).eval(), new_tokens() if ids is None else ids)


def slightly(weight: Tensor) -> None:
    """By less than a hundredth of the embedding's largest number, in every element."""
    weight[0, 0] = 20.0
    weight += 0.004 * torch.randn_like(weight)


@pytest.mark.parametrize("make", [untied, tied])
def test_an_embedding_that_was_trained_a_little_is_used(make: Callable[[], Any], tmp_path: Path) -> None:
    def base() -> Any:
        model = resized(make)()
        with torch.no_grad():
            model.get_input_embeddings().weight[0, 0] = 20.0
        return model

    folder = write(tmp_path, base(), slightly)
    expected = theirs(base(), folder)
    with pytest.warns(UserWarning, match=USED):
        model = ours(base(), [folder])
    assert_close(alone(model), expected, atol=1e-5, rtol=1e-5)
    assert far(alone(ours(base(), [write(tmp_path / "untrained", base())])), expected)
    with pytest.warns(UserWarning, match=USED):
        assert_close(logits_of(loramix.PeftModel.from_pretrained(base(), folder), new_tokens()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_and_one_step_of_the_files_dtype_is(dtype: torch.dtype, tmp_path: Path) -> None:
    base = untied().to(dtype)
    folder = write(tmp_path, base)
    model = ours(untied(), [folder])
    assert torch.equal(model.get_input_embeddings().weight, untied().get_input_embeddings().weight)
    stepped = write(tmp_path / "step", untied().to(dtype), lambda weight: weight[7, 3].mul_(1 + torch.finfo(dtype).eps))
    with pytest.warns(UserWarning, match=rf"rows 7: {USED}"):
        model = ours(untied(), [stepped])
    got = model.get_input_embeddings().weight[7, 3]
    saved = load_file(Path(stepped) / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert got == saved[7, 3]
    assert got != untied().get_input_embeddings().weight[7, 3]


def test_bfloat16_and_float16_differ_by_rounding(tmp_path: Path) -> None:
    folder = write(tmp_path, untied().half())
    ours(untied().bfloat16(), [folder])


@pytest.mark.parametrize(
    ("make", "target"),
    [(untied, "q_proj"), (tied, "q_proj"), (gpt2, "c_attn"), (pythia, "query_key_value"), (bloom, "query_key_value")],
)
def test_new_rows_win_over_those_of_a_base_that_was_resized_again(
    make: Callable[[], Any], target: str, tmp_path: Path
) -> None:
    """Whatever the model calls its embeddings."""
    config = {"target_modules": [target], "fan_in_fan_out": make is gpt2}
    folder = write(tmp_path, resized(make)(), bend, **config)
    same = ours(resized(make)(), [write(tmp_path / "same", resized(make)(), **config)])
    assert far(alone(same), theirs(resized(make)(), folder))
    with pytest.warns(UserWarning, match=rf"rows 96–99: {USED}"):
        model = ours(resized(make, seed=7)(), [folder])
    assert_close(alone(model), theirs(resized(make, seed=7)(), folder), atol=1e-5, rtol=1e-5)


def test_an_expert_on_a_base_that_was_not_resized_says_how_to(tmp_path: Path) -> None:
    folder = write(tmp_path, resized(untied)())
    with pytest.raises(AdapterMismatchError, match=r"base\.resize_token_embeddings\(100\) before"):
        ours(untied(), [folder])
    adapted = write(tmp_path / "adapted", resized(untied)(), target_modules=["embed_tokens"])
    with pytest.raises(AdapterMismatchError, match=r"base\.resize_token_embeddings\(100\) before"):
        ours(untied(), [adapted])
    folder = write(tmp_path / "small", untied())
    with pytest.raises(AdapterMismatchError, match=r"model\.resize_token_embeddings\(100\)"):
        ours(resized(untied)(), [folder])


def conflicting(folder: Path) -> list[str]:
    change = [lambda weight: weight[97].add_(0.1), lambda weight: weight[97:99].sub_(0.1)]
    return [write(folder / str(i), resized(untied)(), change[i]) for i in range(2)]


def test_experts_that_disagree_are_refused_by_row_or_one_is_chosen(tmp_path: Path) -> None:
    experts = conflicting(tmp_path)
    base = resized(untied)()
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(AdapterMismatchError, match=r"different rows 97–98 of 'model\.embed_tokens") as caught:
        ours(base, experts)
    assert "'expert-0' and 'expert-1'" in caught.value.received
    assert "base_weights_of='expert-0'" in caught.value.remedy
    assert all(torch.equal(before[name], p) for name, p in base.named_parameters())
    adapters = dict(zip(("a", "b"), experts, strict=True))
    config = loramix.XLoraConfig(hidden_size=64, adapters=adapters)
    with pytest.raises(ConfigurationError, match=r"base_weights_of='c'.*'a', 'b'"):
        loramix.get_peft_model(base, config, base_weights_of="c")
    with pytest.raises(ConfigurationError, match=r"base_weights_of='c'.*none"):
        loramix.get_peft_model(base, loramix.LoraConfig(target_modules=["q_proj"]), base_weights_of="c")
    with pytest.warns(UserWarning, match=r"rows 97–98: "):
        model = loramix.get_peft_model(base, config, base_weights_of="b").eval()
    assert_close(alone(model, 1), theirs(resized(untied)(), experts[1]), atol=1e-5, rtol=1e-5)


def test_experts_that_agree_share_their_rows(tmp_path: Path) -> None:
    """Also where one of them was saved in a narrower dtype, and one without its embeddings."""
    one = write(tmp_path / "one", resized(untied)(), bend)
    rounded = write(tmp_path / "rounded", resized(untied)(), bend)
    edit_tensors(Path(rounded), lambda tensors: {key: tensor.bfloat16() for key, tensor in tensors.items()})
    silent = str(tmp_path / "silent")
    loramix.get_peft_model(resized(untied)(), loramix.LoraConfig(target_modules=["q_proj"])).save_pretrained(silent)
    for experts, named in (([one, rounded], "experts 'expert-0', 'expert-1'"), ([one, silent], "expert 'expert-0'")):
        with pytest.warns(UserWarning, match=f"saved with {named} in rows 96–99"):
            model = ours(resized(untied)(), experts)
        assert_close(alone(model), theirs(resized(untied)(), one), atol=1e-5, rtol=1e-5)


def test_the_rows_are_saved_with_the_mixture_and_taken_out_with_the_experts(tmp_path: Path) -> None:
    folder = write(tmp_path / "expert", resized(untied)(), bend)
    with pytest.warns(UserWarning, match=USED):
        model = ours(resized(untied)(), [folder])
    expected, routed = alone(model), logits_of(model, new_tokens())
    model.save_pretrained(tmp_path / "mixture")
    with pytest.warns(UserWarning, match=rf"'lm_head.weight' .*{USED}"):
        again: Any = loramix.PeftModel.from_pretrained(resized(untied, seed=7)(), tmp_path / "mixture")
    assert torch.equal(logits_of(again, new_tokens()), routed)
    again.save_pretrained(tmp_path / "again")
    again = loramix.PeftModel.from_pretrained(resized(untied)(), tmp_path / "again")  # the embedding is its own
    assert torch.equal(logits_of(again, new_tokens()), routed)
    inner = str(tmp_path / "mixture" / "expert-0")  # still an expert that PEFT reads
    assert_close(theirs(resized(untied, seed=7)(), inner), expected, atol=1e-5, rtol=1e-5)
    with model.fixed_scalings([1.0]):
        merged = model.merge_and_unload()
    assert_close(logits_of(merged, new_tokens()), expected, atol=1e-5, rtol=1e-5)
    plain = again.unload()
    assert all(map(torch.equal, plain.state_dict().values(), resized(untied)().state_dict().values()))


@pytest.mark.parametrize("dora", [False, True])
def test_adapted_embeddings_and_heads_take_the_saved_rows_too(dora: bool, tmp_path: Path) -> None:
    targets = ["q_proj", "lm_head"] if dora else ["q_proj", "embed_tokens", "lm_head"]
    config = {"target_modules": targets, "use_dora": dora}
    folder = write(tmp_path / "expert", resized(untied)(), **config)
    with pytest.warns(UserWarning, match=USED):
        model = ours(resized(untied, seed=7)(), [folder])
    expected = theirs(resized(untied, seed=7)(), folder)
    assert_close(alone(model), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "mixture")
    # where the head alone is adapted, PEFT does not save the embedding
    base = resized(untied, seed=7 if dora else 8)()
    assert_close(theirs(base, str(tmp_path / "mixture" / "expert-0")), expected, atol=1e-5, rtol=1e-5)


def test_a_fixed_mixture_is_saved_with_its_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "expert", resized(untied)(), bend)
    with pytest.warns(UserWarning, match=USED):
        model = ours(resized(untied)(), [folder])
    model.fix_routing([1.0])
    model.save_fixed(tmp_path / "fixed")
    assert_close(theirs(resized(untied, seed=7)(), str(tmp_path / "fixed")), alone(model), atol=1e-5, rtol=1e-5)


def test_what_an_expert_may_not_bring_is_named(tmp_path: Path) -> None:
    for key, kind in [("model.norm.weight", UnsupportedAdapterError), ("model.odd.weight", AdapterMismatchError)]:
        folder = Path(write(tmp_path / key, untied()))
        edit_tensors(folder, lambda tensors, key=key: tensors | {f"base_model.model.{key}": torch.full((64,), 2.0)})
        with pytest.raises(kind, match="'expert-0'.*" + key.removesuffix(".weight")):
            ours(untied(), [str(folder)])


def test_an_untied_expert_on_a_tied_base_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, untied())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = untied()
        base.lm_head.weight = base.model.embed_tokens.weight
    with pytest.raises((UnsupportedAdapterError, AdapterMismatchError), match="'expert-0'"):
        ours(base, [folder])
