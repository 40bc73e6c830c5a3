"""Heads that PEFT saves with experts of classification tasks: a mixture computes what PEFT does with the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close

import loramix
from loramix.errors import AdapterMismatchError, IncompleteCheckpointError, UnsupportedAdapterError
from support.checkpoints import edit_tensors
from support.mixtures import far
from support.peft_side import PEFT_WARNINGS, ours
from support.tiny import BLOCKS, GATED, build, llama, tokens

pytestmark = pytest.mark.filterwarnings(*PEFT_WARNINGS)

ENCODER = {**BLOCKS, "intermediate_size": 128, "num_labels": 3}
TASKS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "bert": ("BertForSequenceClassification", "SEQ_CLS", ENCODER, ["query", "value"]),
    "roberta, a head of two layers": ("RobertaForSequenceClassification", "SEQ_CLS", ENCODER, ["query", "value"]),
    "llama": ("LlamaForSequenceClassification", "SEQ_CLS", {**GATED, "num_labels": 3}, ["q_proj", "v_proj"]),
    "tokens": ("BertForTokenClassification", "TOKEN_CLS", ENCODER, ["query", "value"]),
    "questions": ("BertForQuestionAnswering", "QUESTION_ANS", {**ENCODER, "num_labels": 2}, ["query", "value"]),
}


def base_of(task: str, seed: int = 0) -> Any:
    """A base model of one body; the head is drawn with the seed, as transformers draws a new one."""
    model = build(getattr(transformers, TASKS[task][0]), **TASKS[task][2])
    torch.manual_seed(100 + seed)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            torch.nn.init.normal_(parameter)
    return model


def write(folder: Path, task: str, seed: int, head: int) -> str:
    """An expert as PEFT saves it, with a head trained away from the base model's."""
    _, kind, _, targets = TASKS[task]
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets, task_type=kind)
    base = base_of(task)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, config)
    torch.manual_seed(10 + head)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += torch.randn_like(parameter)
    model.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    out = model.eval()(tokens(), attention_mask=mask)
    return out.logits if "logits" in out else torch.stack([out.start_logits, out.end_logits])


def theirs(task: str, folder: str, seed: int = 5) -> Tensor:
    return outputs(peft.PeftModel.from_pretrained(base_of(task, seed), folder))


def alone(model: Any, expert: int) -> Tensor:
    with model.fixed_scalings([float(i == expert) for i in range(len(model.expert_names))]):
        return outputs(model)


@pytest.mark.parametrize("task", TASKS)
def test_equal_heads_are_used(task: str, tmp_path: Path) -> None:
    """Whatever head the base model was given; nothing warns."""
    kind = TASKS[task][1]
    experts = [write(tmp_path / str(i), task, seed=i, head=0) for i in range(2)]
    model = ours(base_of(task, seed=7), experts, task_type=kind)
    for i, folder in enumerate(experts):
        assert_close(alone(model, i), theirs(task, folder), atol=1e-5, rtol=1e-5)
    assert far(alone(model, 0), alone(model, 1))
    single: Any = loramix.PeftModel.from_pretrained(base_of(task, seed=8), experts[1])
    assert_close(outputs(single), theirs(task, experts[1]), atol=1e-5, rtol=1e-5)
    routed = outputs(model)
    model.save_pretrained(tmp_path / "mixture")
    again: Any = loramix.PeftModel.from_pretrained(base_of(task, seed=9), tmp_path / "mixture")
    assert torch.equal(outputs(again), routed)
    again.fix_routing([0.4, 0.6])
    again.save_fixed(tmp_path / "fixed")
    assert_close(theirs(task, str(tmp_path / "fixed")), outputs(again), atol=1e-5, rtol=1e-5)
    plain = model.unload()
    assert all(map(torch.equal, plain.state_dict().values(), base_of(task, seed=7).state_dict().values()))


@pytest.mark.parametrize("task", ["bert", "llama"])
def test_different_heads_are_refused_by_name_or_one_is_chosen(task: str, tmp_path: Path) -> None:
    folders = {name: write(tmp_path / name, task, seed=i, head=i) for i, name in enumerate(("mood", "topic"))}
    config = loramix.XLoraConfig(hidden_size=64, adapters=folders, task_type="SEQ_CLS")
    head = "classifier.weight" if task == "bert" else "score.weight"
    base = base_of(task)
    with pytest.raises(AdapterMismatchError, match=f"'mood' and 'topic'.*'{head}'"):
        loramix.get_peft_model(base, config)
    assert all(map(torch.equal, base.state_dict().values(), base_of(task).state_dict().values()))
    model: Any = loramix.get_peft_model(base, config, base_weights_of="topic")
    assert_close(alone(model, 1), theirs(task, folders["topic"]), atol=1e-5, rtol=1e-5)
    routed = outputs(model)
    model.save_pretrained(tmp_path / "mixture")
    again = loramix.PeftModel.from_pretrained(base_of(task, seed=9), tmp_path / "mixture")
    assert torch.equal(outputs(again), routed)


@pytest.mark.parametrize("task", ["bert", "llama"])
def test_a_head_that_is_trained_with_the_router_is_saved(task: str, tmp_path: Path) -> None:
    """Over those of the experts, and also after it was loaded and frozen."""
    experts = [write(tmp_path / str(i), task, seed=i, head=0) for i in range(2)]
    model = ours(base_of(task), experts, task_type="SEQ_CLS")
    head = model.classifier if task == "bert" else model.score
    head.requires_grad_(True)
    before = outputs(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(tokens(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    trained = outputs(model)
    assert far(trained, before)
    place = tmp_path / "mixture"
    for _ in range(2):
        model.save_pretrained(place)
        model = loramix.PeftModel.from_pretrained(base_of(task, seed=9), place)
        assert torch.equal(outputs(model), trained)
        place = tmp_path / "again"


@pytest.mark.parametrize("task", ["bert", "llama"])
def test_a_head_that_is_trained_with_a_new_expert_is_saved_as_peft_does(task: str, tmp_path: Path) -> None:
    config = loramix.LoraConfig(r=2, target_modules=TASKS[task][3], task_type="SEQ_CLS", init_lora_weights=False)
    model: Any = loramix.get_peft_model(base_of(task), config)
    head = model.classifier if task == "bert" else model.score
    head.weight.requires_grad_(True)
    with torch.no_grad():
        head.weight += torch.randn_like(head.weight)
    model.save_pretrained(tmp_path)
    assert_close(theirs(task, str(tmp_path)), outputs(model), atol=1e-5, rtol=1e-5)
    again: Any = loramix.PeftModel.from_pretrained(base_of(task, seed=9), tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def test_a_head_without_a_place_and_a_place_without_a_head_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path, "llama", seed=0, head=0)
    with pytest.raises(AdapterMismatchError, match=r"'expert-0'.*'score'"):
        ours(llama(), [folder])
    edit_tensors(tmp_path, lambda tensors: {key: tensor for key, tensor in tensors.items() if "score" not in key})
    with pytest.raises(IncompleteCheckpointError, match=r"'expert-0'.*'score\.weight'"):
        ours(base_of("llama"), [folder])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["lm_head"], ["norm"]])
def test_any_module_that_peft_saves_is_used(saved: list[str], tied: bool, tmp_path: Path) -> None:
    """Where the base model ties two of them, PEFT unties them: an expert that needs this is refused."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, task_type="CAUSAL_LM")
    make: Callable[[], Any] = lambda: llama(tie_word_embeddings=tied)  # noqa: E731
    model = peft.get_peft_model(make(), config)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    if tied and "lm_head" in saved:
        with pytest.raises(UnsupportedAdapterError, match=r"'expert-0'.*'lm_head\.weight'"):
            ours(make(), [str(tmp_path)])
        return
    mixture = ours(make(), [str(tmp_path)])
    assert_close(alone(mixture, 0), outputs(peft.PeftModel.from_pretrained(make(), tmp_path)), atol=1e-5, rtol=1e-5)


def test_a_new_expert_takes_no_modules_to_save() -> None:
    with pytest.raises(UnsupportedAdapterError, match="requires_grad_"):
        loramix.get_peft_model(llama(), loramix.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
