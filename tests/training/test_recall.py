"""The scaling pass, paid once: later epochs read what the first one computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from loramix import ConfigurationError, UnsupportedOperationError, XLoraConfig, get_peft_model
from loramix.passes.state import state_of
from loramix.training import ScalingPassCache, required_bytes
from support.tiny import ARCHITECTURES, gpt2, llama, opt, tokens

PLENTY = 2**20


def mixture(experts: Any, architecture: str = "llama", base: Any = None, **config: Any) -> Any:
    base = ARCHITECTURES[architecture]() if base is None else base
    torch.manual_seed(1)
    settings = {"hidden_size": 64, "adapters": experts(architecture), **config}
    return get_peft_model(base, XLoraConfig(**settings)).train()


def step(model: Any, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 0, -100)  # 0 is padding
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), model.internal_xlora_classifier.layers[0].weight.grad.clone()


@pytest.fixture(params=["memory", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "disk" else None


def test_an_identical_batch_gives_identical_gradients(experts: Any, folder: Path | None) -> None:
    model = mixture(experts)
    expected = step(model, input_ids=tokens())
    with ScalingPassCache(model, max_bytes=PLENTY, folder=folder) as cache:
        for _ in range(3):
            assert all(map(torch.equal, step(model, input_ids=tokens()), expected))
        assert (cache.hits, cache.misses) == (2, 1)
        assert cache.bytes == required_bytes(model, tokens().numel())
    assert state_of(model).hooks == ()
    assert folder is None or list(folder.iterdir()) == []


def test_the_scaling_pass_does_not_run_again(experts: Any) -> None:
    model = mixture(experts)
    calls: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with ScalingPassCache(model, max_bytes=PLENTY):
        step(model, input_ids=tokens())
        assert len(calls) == 2
        step(model, input_ids=tokens())
        assert len(calls) == 3


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_found_again_in_other_batches(
    architecture: str, side: str, experts: Any, folder: Path | None
) -> None:
    model = mixture(experts, architecture)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    short = slice(5, None) if side == "right" else slice(None, 3)
    ids[1, short], mask[1, short] = 0, 0
    with ScalingPassCache(model, max_bytes=PLENTY, folder=folder) as cache:
        step(model, input_ids=ids, attention_mask=mask)
        again = step(model, input_ids=ids[[2, 1]], attention_mask=mask[[2, 1]])
        assert cache.hits == 1
    assert_close(again, step(model, input_ids=ids[[2, 1]], attention_mask=mask[[2, 1]]), atol=1e-5, rtol=1e-4)


def test_padding_that_is_longer_does_not_hide_a_text(experts: Any) -> None:
    model = mixture(experts)
    ids = tokens(1, 6)
    with ScalingPassCache(model, max_bytes=PLENTY) as cache:
        step(model, input_ids=ids)
        padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
        step(model, input_ids=padded, attention_mask=(padded != 0).long())
        assert cache.hits == 1


@pytest.mark.parametrize(
    "change",
    [
        {"input_ids": tokens(seed=9)},
        {"position_ids": torch.arange(3, 12).expand(2, 9)},
        {"attention_mask": torch.tensor([[0, 0] + [1] * 7, [1] * 9])},
    ],
    ids=["tokens", "positions", "mask"],
)
def test_another_text_is_another_text(change: dict[str, Tensor], experts: Any) -> None:
    model = mixture(experts)
    with ScalingPassCache(model, max_bytes=PLENTY) as cache:
        step(model, input_ids=tokens())
        found = step(model, **{"input_ids": tokens(), **change})
        assert cache.hits == 0
    assert all(map(torch.equal, found, step(model, **{"input_ids": tokens(), **change})))


def test_another_scaling_pass_value_is_another_pass(experts: Any) -> None:
    model = mixture(experts)
    with ScalingPassCache(model, max_bytes=PLENTY) as cache:
        step(model, input_ids=tokens())
        model.set_scaling_pass_value(0.5)
        found = step(model, input_ids=tokens())
        assert cache.hits == 0
    assert all(map(torch.equal, found, step(model, input_ids=tokens())))


def test_embeddings_and_generation_are_not_read_from_it(experts: Any) -> None:
    model = mixture(experts).eval()
    expected = model.generate(tokens(), max_new_tokens=3, do_sample=False)
    with ScalingPassCache(model, max_bytes=PLENTY) as cache:
        model(inputs_embeds=model.model.embed_tokens(tokens()))
        assert torch.equal(model.generate(tokens(), max_new_tokens=3, do_sample=False), expected)
        assert cache.hits == 0


def test_it_stops_at_its_limit_and_says_so(experts: Any, folder: Path | None) -> None:
    model = mixture(experts)
    ids = tokens(3, 8)
    limit = required_bytes(model, 20)
    with ScalingPassCache(model, max_bytes=limit, folder=folder) as cache:
        with pytest.warns(UserWarning, match="is full with"):
            step(model, input_ids=ids)
        assert cache.bytes == required_bytes(model, 16) <= limit
        found = step(model, input_ids=ids)
        assert cache.hits == 0
        step(model, input_ids=ids[:2])
        assert cache.hits == 1
    assert all(map(torch.equal, found, step(model, input_ids=ids)))
    with pytest.raises(ConfigurationError, match="one token takes 256"):
        ScalingPassCache(model, max_bytes=100)


def test_half_precision_is_kept_bit_by_bit(experts: Any, folder: Path | None) -> None:
    model = mixture(experts, base=llama().bfloat16())
    expected = step(model, input_ids=tokens())
    with ScalingPassCache(model, max_bytes=PLENTY, folder=folder) as cache:
        for _ in range(2):
            assert all(map(torch.equal, step(model, input_ids=tokens()), expected))
        assert cache.hits == 1


def trainable_base(experts: Any) -> Any:
    model = mixture(experts)
    model.lm_head.weight.requires_grad_(True)
    return model


def dropping_by_hand(experts: Any) -> Any:
    model = mixture(experts)
    model.model.layers[0].mlp.act_fn = nn.Dropout(0.3)
    return model


def noisy(experts: Any) -> Any:
    model = mixture(experts)
    model.get_input_embeddings().neftune_noise_alpha = 5.0  # as transformers.Trainer does it
    return model


CHANGING = {
    "the base model's lm_head.weight is trained": trainable_base,
    "drops with p=0.3": dropping_by_hand,
    "resid_pdrop=0.1": lambda experts: mixture(experts, "gpt2", gpt2(attn_pdrop=0.0)),
    "has dropout=0.1": lambda experts: mixture(experts, "opt", opt(dropout=0.1)),
    "neftune_noise_alpha=5.0": noisy,
    "attn_pdrop=0.1": lambda experts: mixture(experts, "gpt2", gpt2(resid_pdrop=0.0, embd_pdrop=0.0)),
    "scaling_pass_value=0.5": lambda experts: mixture(experts, use_trainable_adapters=True, scaling_pass_value=0.5),
}


@pytest.mark.parametrize("reason", CHANGING)
def test_a_pass_that_changes_is_refused(reason: str, experts: Any) -> None:
    with pytest.raises(UnsupportedOperationError) as caught:
        ScalingPassCache(CHANGING[reason](experts), max_bytes=PLENTY)
    assert reason in caught.value.received


def test_a_base_that_is_thawed_later_is_refused_then(experts: Any) -> None:
    model = mixture(experts)
    with ScalingPassCache(model, max_bytes=PLENTY):
        model.lm_head.weight.requires_grad_(True)
        with pytest.raises(UnsupportedOperationError, match="lm_head"):
            step(model, input_ids=tokens())


def test_experts_may_train_while_the_scaling_pass_is_the_bases(experts: Any) -> None:
    model = mixture(experts, use_trainable_adapters=True)
    with ScalingPassCache(model, max_bytes=PLENTY) as cache:
        step(model, input_ids=tokens())
        step(model, input_ids=tokens())
        assert cache.hits == 1


def test_trainer_gets_the_same_weights_from_it(experts: Any, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6, seed=4)]

    def run(cached: bool) -> tuple[Tensor, int]:
        model = mixture(experts)
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        hits = 0
        if cached:
            with ScalingPassCache(model, max_bytes=PLENTY) as cache:
                trainer.train()
                hits = cache.hits
        else:
            trainer.train()
        return model.internal_xlora_classifier.layers[0].weight.detach(), hits

    (plain, _), (cached, hits) = run(False), run(True)
    assert hits == 8
    assert_close(cached, plain, atol=1e-4, rtol=1e-3)
    assert not math.isnan(float(cached.sum()))


def test_a_pass_in_which_all_processes_must_take_part_is_refused(experts: Any) -> None:
    model = mixture(experts)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with ScalingPassCache(model, max_bytes=PLENTY):
            fully_shard(model.model.layers[0], mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(UnsupportedOperationError, match="FSDP2"):
                model(tokens(), labels=tokens())
    finally:
        distributed.destroy_process_group()


def test_evaluation_keeps_nothing_and_takes_no_room(experts: Any) -> None:
    model = mixture(experts)
    with ScalingPassCache(model, max_bytes=required_bytes(model, tokens().numel())) as cache:
        with torch.no_grad():
            model.eval()(tokens(seed=7), labels=tokens(seed=7))
        model.train()
        for _ in range(2):
            step(model, input_ids=tokens())
        assert (cache.hits, cache.misses) == (1, 1)


def test_a_full_disk_ends_the_keeping_and_not_the_training(
    experts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture(experts)
    expected = step(model, input_ids=tokens())
    with (
        ScalingPassCache(model, max_bytes=PLENTY, folder=tmp_path) as cache,
        Path("/dev/full").open("r+b", buffering=0) as full,
        monkeypatch.context() as patch,
    ):
        patch.setattr(cache._store, "_file", full)
        with pytest.warns(UserWarning, match="or its disk, is full with 0 bytes"):
            assert all(map(torch.equal, step(model, input_ids=tokens()), expected))
        assert all(map(torch.equal, step(model, input_ids=tokens()), expected))
        assert cache.hits == 0


def test_a_folder_that_cannot_be_written_is_told(experts: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="can be written"):
        ScalingPassCache(mixture(experts), max_bytes=PLENTY, folder=tmp_path / "file" / "cache")
