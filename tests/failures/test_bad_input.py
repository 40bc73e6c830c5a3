"""Bad input through the public calls: the right error, that says what to do; base model and disk stay as they were."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loramix import LoraConfig, PeftModel, XLoraConfig, errors, get_peft_model
from support.disk import WEIGHTS, damaged, edited, truncated, without
from support.peft_side import PEFT_WARNINGS
from support.refusals import refused
from support.tiny import llama, save_expert

CONFIG = "adapter_config.json"
Make = Callable[[str, Path], object]


def empty_folder(_: str, bad: Path) -> Path:
    bad.mkdir()
    return bad


def model_folder(_: str, bad: Path) -> Path:
    llama().save_pretrained(bad)
    return bad


def lacking(part: str) -> Make:
    return lambda good, bad: without(good, bad, part)


def no_weights(good: str, bad: Path) -> Path:
    shutil.copytree(good, bad)
    (bad / WEIGHTS).unlink()
    return bad


def of_base(targets: list[str], **changes: Any) -> Make:
    return lambda _, bad: save_expert(bad, llama(**changes), target_modules=targets)


EXPERTS: dict[str, tuple[type[errors.LoramixError], Make, list[str]]] = {
    "missing path": (errors.CheckpointNotFoundError, lambda _, bad: bad, ["does not exist"]),
    "empty folder": (errors.CheckpointNotFoundError, empty_folder, [CONFIG]),
    "a model's folder": (errors.CheckpointNotFoundError, model_folder, ["a model's folder"]),
    "no weights": (errors.CheckpointNotFoundError, no_weights, [WEIGHTS]),
    "truncated": (errors.CorruptCheckpointError, truncated, [WEIGHTS]),
    "empty file": (errors.CorruptCheckpointError, lambda good, bad: damaged(good, bad, WEIGHTS, b""), ["empty file"]),
    "noise": (errors.CorruptCheckpointError, lambda good, bad: damaged(good, bad, WEIGHTS, b"\xff" * 99), [WEIGHTS]),
    "corrupt JSON": (errors.CorruptCheckpointError, lambda good, bad: damaged(good, bad, CONFIG, b"{,"), [CONFIG]),
    "empty JSON": (errors.CorruptCheckpointError, lambda good, bad: damaged(good, bad, CONFIG, b""), [CONFIG]),
    "a list": (errors.CorruptCheckpointError, lambda good, bad: damaged(good, bad, CONFIG, b"[]"), [CONFIG]),
    "missing matrix": (
        errors.IncompleteCheckpointError,
        lacking("layers.1.mlp.up_proj.lora_A"),
        ["layers.1.mlp.up_proj"],
    ),
    "missing blocks": (errors.AdapterMismatchError, lacking("layers.1."), ["layers.1.self_attn.q_proj"]),
    "deeper base": (
        errors.AdapterMismatchError,
        of_base(["q_proj"], num_hidden_layers=3),
        ["model.layers.2.self_attn"],
    ),
    "shallower base": (
        errors.AdapterMismatchError,
        of_base(["q_proj"], num_hidden_layers=1),
        ["model.layers.1.self_attn"],
    ),
    "wider base": (
        errors.AdapterMismatchError,
        of_base(["up_proj"], intermediate_size=96),
        ["layers.0.mlp.up_proj", "(96, 4)"],
    ),
    "other vocabulary": (
        errors.AdapterMismatchError,
        of_base(["embed_tokens"], vocab_size=80),
        ["embed_tokens", "80", "96"],
    ),
    "a module to save that is missing": (
        errors.IncompleteCheckpointError,
        lambda good, bad: edited(good, bad, modules_to_save=["lm_head"]),
        ["modules_to_save=['lm_head']", "'lm_head.weight'"],
    ),
    "wrong rank": (errors.CorruptCheckpointError, lambda good, bad: edited(good, bad, r=7), ["r=7"]),
    "another method": (
        errors.UnsupportedAdapterError,
        lambda good, bad: edited(good, bad, peft_type="PREFIX_TUNING"),
        ["PREFIX_TUNING"],
    ),
}
FEATURES: dict[str, Any] = {
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "init_lora_weights": "pissa",
    "megatron_config": {"a": 1},
}


def adapters(good: str, bad: object) -> dict[str, str]:
    return {"good": good, "the-bad-one": str(bad)}


@pytest.mark.parametrize("fault", EXPERTS)
def test_a_bad_expert(fault: str, experts: Any, tmp_path: Path) -> None:
    error, make, named = EXPERTS[fault]
    good, base = experts("llama")["math"], llama()
    bad = make(good, tmp_path / "bad")
    config = XLoraConfig(hidden_size=64, adapters=adapters(good, bad))
    caught = refused(error, base, tmp_path, lambda: get_peft_model(base, config))
    for part in ["'the-bad-one'", *named]:
        assert part in caught.received + caught.rule


@pytest.mark.parametrize("fault", ["missing path", "truncated", "deeper base", "corrupt JSON"])
def test_a_bad_expert_in_place_of_a_saved_one(fault: str, experts: Any, tmp_path: Path) -> None:
    error, make, named = EXPERTS[fault]
    good, base = experts("llama")["math"], llama()
    saved: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama")))
    saved.save_pretrained(tmp_path / "mixture")
    new = {"code": str(make(good, tmp_path / "bad"))}
    load = lambda: PeftModel.from_pretrained(base, tmp_path / "mixture", adapters=new)  # noqa: E731
    caught = refused(error, base, tmp_path, load)
    assert "'code'" in caught.received
    assert all(part in caught.received + caught.rule for part in named)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_refused_before_any_weight_is_read(feature: str, experts: Any, tmp_path: Path) -> None:
    """The weights are broken too, and it is the feature that is named."""
    good, base = experts("llama")["math"], llama()
    broken = damaged(good, tmp_path / "broken", WEIGHTS, b"")
    bad = edited(broken, tmp_path / "bad", **{feature: FEATURES[feature]})
    config = XLoraConfig(hidden_size=64, adapters=adapters(good, bad))
    caught = refused(errors.UnsupportedAdapterError, base, tmp_path, lambda: get_peft_model(base, config))
    assert f"{feature}={FEATURES[feature]!r}" in caught.received
    assert "'the-bad-one'" in caught.received


@pytest.mark.filterwarnings(*PEFT_WARNINGS, "ignore:Could not find a config file:UserWarning")
def test_an_expert_of_peft_that_reaches_where_no_expert_can(experts: Any, tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5])
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "bad")
    base = llama()
    both = XLoraConfig(hidden_size=64, adapters=adapters(experts("llama")["math"], tmp_path / "bad"))
    caught = refused(errors.UnsupportedAdapterError, base, tmp_path, lambda: get_peft_model(base, both))
    assert "'the-bad-one'" in caught.received
    assert "alora_invocation_tokens" in caught.received


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_a_mixture_that_peft_saved_without_its_classifier(experts: Any, tmp_path: Path) -> None:
    import peft

    base = llama()
    base.config.use_cache = False
    numbered = {str(i): folder for i, folder in enumerate(experts("llama").values())}
    settings = {"hidden_size": 64, "adapters": numbered, "xlora_depth": 2, "xlora_size": 8}
    peft.get_peft_model(base, peft.XLoraConfig(**settings)).save_pretrained(tmp_path)
    base = llama()
    caught = refused(
        errors.IncompleteCheckpointError, base, tmp_path, lambda: PeftModel.from_pretrained(base, tmp_path)
    )
    assert "PEFT 0.20 to 0.21.2" in caught.received
    assert "layers.0.weight" in caught.received


MIXTURES: dict[str, tuple[type[errors.LoramixError], Callable[[Path, Path], object], str]] = {
    "missing path": (errors.CheckpointNotFoundError, lambda _, bad: bad, "does not exist"),
    "empty folder": (errors.CheckpointNotFoundError, lambda _, bad: bad.mkdir(), CONFIG),
    "empty router": (errors.CorruptCheckpointError, lambda m, bad: damaged(m, bad, WEIGHTS, b""), "empty file"),
    "corrupt JSON": (errors.CorruptCheckpointError, lambda m, bad: damaged(m, bad, CONFIG, b"{"), CONFIG),
    "another depth": (
        errors.IncompleteCheckpointError,
        lambda m, bad: edited(m, bad, xlora_depth=2),
        "layers.3.weight",
    ),
    "zero depth": (errors.ConfigurationError, lambda m, bad: edited(m, bad, xlora_depth=0), "xlora_depth=0"),
    "a torn expert": (
        errors.CorruptCheckpointError,
        lambda m, bad: damaged(m, bad, f"code/{WEIGHTS}", b"x"),
        "'code'",
    ),
    "too large a top-k": (errors.ConfigurationError, lambda m, bad: edited(m, bad, top_k_lora=9), "top_k_lora=9"),
}


@pytest.mark.parametrize("fault", MIXTURES)
def test_a_bad_mixture(fault: str, experts: Any, tmp_path: Path) -> None:
    error, make, named = MIXTURES[fault]
    saved: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama")))
    saved.save_pretrained(tmp_path / "mixture")
    make(tmp_path / "mixture", tmp_path / "bad")
    base = llama()
    caught = refused(error, base, tmp_path, lambda: PeftModel.from_pretrained(base, tmp_path / "bad"))
    assert named in caught.received + caught.rule


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"hidden_size": 32}], ids=str)
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_mixture_of_another_base(changes: dict[str, int], layerwise: bool, experts: Any, tmp_path: Path) -> None:
    config = XLoraConfig(hidden_size=64, adapters=experts("llama"), layerwise_scalings=layerwise)
    saved: Any = get_peft_model(llama(), config)
    saved.save_pretrained(tmp_path)
    base = llama(**changes)
    error = errors.ConfigurationError if "hidden_size" in changes else errors.AdapterMismatchError
    caught = refused(error, base, tmp_path, lambda: PeftModel.from_pretrained(base, tmp_path))
    assert "hidden_size=64" in caught.received or "'math'" in caught.received


@pytest.mark.parametrize("name", ["../x", "", "a/b", "a\\b", "..", "nul", "a:b", " a", "adapter_config.json"])
def test_a_name_that_can_be_no_folder(name: str, experts: Any, tmp_path: Path) -> None:
    base, folder = llama(), experts("llama")["math"]
    build = lambda: get_peft_model(base, XLoraConfig(hidden_size=64, adapters={"good": folder, name: folder}))  # noqa: E731
    assert repr(name) in refused(errors.AdapterNameError, base, tmp_path, build).received


def test_names_that_clash(experts: Any, tmp_path: Path) -> None:
    base, folder = llama(), experts("llama")["math"]
    build = lambda: get_peft_model(base, XLoraConfig(hidden_size=64, adapters={"Math": folder, "math": folder}))  # noqa: E731
    caught = refused(errors.AdapterNameError, base, tmp_path, build)
    assert "'Math' and 'math'" in caught.received


RULES: dict[str, dict[str, Any]] = {
    "xlora_depth": {"xlora_depth": 0},
    "xlora_size": {"xlora_size": 0, "xlora_depth": 2},
    "xlora_dropout_p": {"xlora_dropout_p": 1.0, "xlora_depth": 2},
    "softmax_temperature": {"softmax_temperature": 0.0},
    "softmax_temperature below": {"softmax_temperature": -1.0},
    "softmax_temperature infinite": {"softmax_temperature": math.inf},
    "softmax_temperature of NaN": {"softmax_temperature": math.nan},
    "top_k_lora": {"top_k_lora": 4},
    "top_k_lora below": {"top_k_lora": 0},
    "adapters": {"adapters": {}},
    "hidden_size": {"hidden_size": 4096},
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_of_the_configuration(rule: str, experts: Any, tmp_path: Path) -> None:
    base = llama()

    def build() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            config = XLoraConfig(**{"hidden_size": 64, "adapters": experts("llama"), **RULES[rule]})
        return get_peft_model(base, config)

    field = rule.split()[0]
    caught = refused(errors.ConfigurationError, base, tmp_path, build)
    assert field in caught.received
    assert repr(RULES[rule][field]) in caught.received


def test_size_and_dropout_matter_only_where_there_are_hidden_layers(experts: Any) -> None:
    config = XLoraConfig(hidden_size=64, adapters=experts("llama"), xlora_size=0, xlora_dropout_p=1.0)
    assert get_peft_model(llama(), config).expert_names == ["math", "code", "prose"]


def test_what_only_warns() -> None:
    for settings, text in [
        ({"adapters": {"a": "b"}}, "hidden_size"),
        ({"hidden_size": 64}, "adapters"),
        (
            {"hidden_size": 64, "adapters": {"a": "b"}, "enable_softmax": False, "enable_softmax_topk": True},
            "top_k_lora",
        ),
        ({"hidden_size": 64, "adapters": {"a": "b"}, "enable_softmax_topk": True, "top_k_lora": 1}, "worse"),
        ({"hidden_size": 64, "adapters": {"a": "b"}, "top_k_lora": 0}, "top_k_lora"),
    ]:
        with pytest.warns(UserWarning, match=text):
            XLoraConfig(**settings)


def test_a_hidden_size_that_was_not_given_is_the_base_models(experts: Any) -> None:
    with pytest.warns(UserWarning, match="hidden_size"):
        config = XLoraConfig(adapters=experts("llama"))
    model: Any = get_peft_model(llama(), config)
    assert model.peft_config["default"].hidden_size == 64
    assert model.internal_xlora_classifier.layers[0].in_features == 64


def test_a_base_whose_weights_are_divided_among_processes(experts: Any, tmp_path: Path) -> None:
    base = llama()
    head = base.get_output_embeddings()
    assert head is not None
    head.weight.ds_id = 3  # type: ignore[attr-defined]
    config = XLoraConfig(hidden_size=64, adapters=experts("llama"))
    told = refused(errors.ModelError, base, tmp_path, lambda: get_peft_model(base, config))
    assert "divided among processes" in told.received


@pytest.mark.filterwarnings(*PEFT_WARNINGS)
def test_a_base_that_carries_an_adapter_of_pefts(experts: Any, tmp_path: Path) -> None:
    import peft

    config = XLoraConfig(hidden_size=64, adapters=experts("llama"))
    get_peft_model(llama(), config).save_pretrained(tmp_path / "mixture")
    inner: Any = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).get_base_model()
    for call in (
        lambda: get_peft_model(inner, config),
        lambda: get_peft_model(inner, LoraConfig(target_modules=["q_proj"])),
        lambda: PeftModel.from_pretrained(inner, tmp_path / "mixture"),
    ):
        caught = refused(errors.ModelError, inner, tmp_path, call)
        assert "unload()" in caught.remedy


WRONG_REPLACEMENTS: dict[str, dict[str, str]] = {
    "too few": {"new": "math"},
    "too many": dict.fromkeys(("a", "b", "c", "d"), "math"),
    "old and new": {"math": "math", "new1": "code", "new2": "prose"},
    "none": {},
}


@pytest.mark.parametrize("case", WRONG_REPLACEMENTS)
def test_adapters_that_do_not_fit_the_checkpoints(case: str, experts: Any, tmp_path: Path) -> None:
    saved: Any = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters=experts("llama")))
    saved.save_pretrained(tmp_path)
    given = {name: experts("llama")[of] for name, of in WRONG_REPLACEMENTS[case].items()}
    base = llama()
    load = lambda: PeftModel.from_pretrained(base, tmp_path, adapters=given)  # noqa: E731
    caught = refused(errors.ConfigurationError, base, tmp_path, load)
    assert "'math', 'code', 'prose'" in caught.received
    assert all(repr(name) in caught.received for name in given)


def test_a_good_expert_after_all_these_still_builds(experts: Any) -> None:
    base = llama()
    for fault in ("missing path",):
        with pytest.raises(EXPERTS[fault][0]):
            get_peft_model(base, XLoraConfig(hidden_size=64, adapters={"bad": "./no-such-folder"}))
    model: Any = get_peft_model(base, XLoraConfig(hidden_size=64, adapters=experts("llama"))).eval()
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(4, 12).unsqueeze(0)).logits).all()
