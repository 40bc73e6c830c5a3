"""`loramix check`: which targets of a base model work, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from support.tiny import BLOCKS, GATED, SPECIAL
from support.versions import needs_transformers


def save(config: Any, kind: type[Any], folder: Path) -> Path:
    config.architectures = [kind.__name__]
    config.save_pretrained(folder)
    return folder


def test_a_usual_model_works(loramix, folders) -> None:
    done = loramix("check", folders.base)
    assert done.code == 0
    assert done.err == ""
    for fact in ("LlamaForCausalLM", "LlamaModel, hidden size 64", "model.layers.*.self_attn.q_proj", "works"):
        assert fact in done.out
    assert "lm_head" not in done.out


def test_the_answer_as_json(loramix, folders) -> None:
    document = json.loads(loramix("check", folders.base, "--targets", "q_proj, embed_tokens", "--json").out)
    assert (document["works"], document["dry_run"], document["problem"]) == (True, True, None)
    assert [(group["name"], group["layers"]) for group in document["targets"]] == [
        ("model.embed_tokens", 1),
        ("model.layers.*.self_attn.q_proj", 2),
    ]


@needs_transformers(5, 15, "Mamba calls its dt_proj")
def test_layers_that_do_not_work_are_named_with_what_does(
    loramix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
    folder = save(hf.MambaConfig(**{**SPECIAL, **sizes}), hf.MambaForCausalLM, tmp_path)
    done = loramix("check", folder)
    assert done.code == 1
    assert "is not called: the base model reads its weight" in done.out
    document = json.loads(loramix("check", folder, "--json").out)
    assert document["working_targets"] == ["in_proj", "out_proj", "x_proj"]
    assert loramix("check", folder, "--targets", ",".join(document["working_targets"])).code == 0


def test_positions_and_poolers_work_with_a_static_router_at_most(loramix, tmp_path: Path) -> None:
    folder = save(hf.BertConfig(**{**BLOCKS, "intermediate_size": 96}), hf.BertModel, tmp_path)
    groups = json.loads(loramix("check", folder, "--targets", "query,pooler.dense", "--json").out)["targets"]
    found = {group["name"]: (group["problem"] is None, group["works_with_static"]) for group in groups}
    assert found == {"encoder.layer.*.attention.self.query": (True, True), "pooler.dense": (False, True)}


def test_an_encoder_and_a_decoder_work(loramix, tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    done = loramix("check", save(config, hf.T5ForConditionalGeneration, tmp_path))
    assert done.code == 0
    assert "T5Stack, hidden size 64" in done.out


def test_a_vision_tower_works_with_a_static_router(loramix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text, vision = {**GATED, "model_type": "llama"}, {"hidden_size": 32, "num_hidden_layers": 1, "image_size": 16}
    vision |= {"num_attention_heads": 4, "patch_size": 8, "model_type": "clip_vision_model"}
    config = hf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=95)
    folder = save(config, hf.LlavaForConditionalGeneration, tmp_path)
    groups = json.loads(loramix("check", folder, "--targets", "q_proj", "--json").out)["targets"]
    found = {group["name"].split(".")[1]: (group["problem"], group["works_with_static"]) for group in groups}
    assert found == {"language_model": (None, True), "vision_tower": ("is called outside the backbone", True)}


@pytest.mark.parametrize("targets", ["nothing_like_it", "q_prj"])
def test_targets_that_match_nothing_are_an_error(targets: str, loramix, folders) -> None:
    done = loramix("check", folders.base, "--targets", targets)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ConfigurationError: target_modules names at least one module")


def test_the_model_that_ships(loramix) -> None:
    assert loramix("check", "demo").code == 0
