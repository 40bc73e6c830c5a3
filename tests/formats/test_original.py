"""The original X-LoRA library's folders: read, written, and refused where it computes something else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from loramix import AutoPeftModelForCausalLM, PeftConfig, PeftModel, XLoraConfig
from loramix.errors import (
    AdapterNameError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    LoramixError,
    SaveError,
    UnsupportedAdapterError,
    UnsupportedOperationError,
)
from loramix.formats import describe, detect, load_adapter, load_mixture, save_adapter, save_mixture
from support.checkpoints import contents, make_expert, make_mixture, same_expert, same_tensors
from support.mixtures import far, logits_of
from support.original import CLASSIFIER, CONFIG, classifier_of, edit_original, forward_of_original, write_original
from support.tiny import llama, tokens

SAVED = Path(__file__).parent / "original_library"
"""A mixture that the library itself saved, at 8217992 with PEFT 0.18.1: depth 2, layerwise, dropout 0."""
LAYERS = 14


@pytest.fixture
def folder(experts: Any, tmp_path: Path) -> Path:
    """The library's folder of two experts of a tiny Llama."""
    return write_original(tmp_path / "original", two(experts), LAYERS, layerwise_scalings=True, xlora_size=8)


def two(experts: Any) -> dict[str, str]:
    return {name: experts("llama")[name] for name in ("math", "code")}


class TestReading:
    def test_what_the_library_saved(self) -> None:
        assert detect(SAVED) == "mixture"
        mixture = load_mixture(SAVED)
        assert list(mixture.config.adapters) == [expert.name for expert in mixture.experts] == ["math", "code"]
        assert (mixture.config.xlora_depth, mixture.config.softmax_temperature) == (2, 0.5)
        assert mixture.config.base_model_name_or_path == "user/base"
        saved = load_file(SAVED / CLASSIFIER)
        places = {"inner.0": "layers.0", "last": "layers.2"}  # without dropout, loramix has none in the sequence
        names = {key: f"{places[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}" for key in saved}
        assert same_tensors(mixture.router, {names[key]: tensor for key, tensor in saved.items()})
        assert mixture.num_layers == describe(SAVED).num_layers == 4

    def test_the_classifier_s_biases_that_it_saves_with_each_expert_are_none_of_the_experts(self) -> None:
        held = load_file(SAVED / "math" / "adapter_model.safetensors")
        assert "internal_xlora_classifier.inner.0.bias" in held
        expert = load_adapter("math", SAVED / "math")
        assert not expert.base_weights
        assert sum(len(weights.tensors) for weights in expert.weights.values()) == len(held) - 2

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"layerwise_scalings": True, "use_bias": False},
            {"xlora_depth": 2, "enable_relu_and_dropout": False},
            {"xlora_depth": 3, "xlora_dropout_p": 0.0, "layerwise_scalings": True, "use_bias": False, "top_k_lora": 1},
            {"xlora_depth": 4, "enable_relu_and_dropout": False, "use_bias": False, "layerwise_scalings": True},
            {"xlora_depth": 2, "enable_softmax": False, "top_k_lora": 1},
            {"layerwise_scalings": True, "scaling_pass_value": 0.3, "global_scaling_weight": 0.7},
            {"xlora_depth": 2, "softmax_temperature": 0.1},
        ],
        ids=str,
    )
    def test_its_numbers_are_the_library_s(self, settings: Any, experts: Any, tmp_path: Path) -> None:
        folder = write_original(tmp_path / "original", two(experts), LAYERS, xlora_size=8, **settings)
        expected = forward_of_original(llama(), folder, tokens())
        model = PeftModel.from_pretrained(llama(), folder)
        assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
        assert far(logits_of(llama()), expected)
        mixture = load_mixture(folder)
        save_mixture(tmp_path / "again", mixture.config, mixture.router, mixture.experts, format="original")
        assert torch.equal(logits_of(PeftModel.from_pretrained(llama(), tmp_path / "again")), logits_of(model))
        assert torch.equal(forward_of_original(llama(), tmp_path / "again", tokens()), expected)

    def test_a_pickle(self, folder: Path) -> None:
        before = load_mixture(folder)
        torch.save(load_file(folder / CLASSIFIER), folder / "xlora_classifier.pt")
        (folder / CLASSIFIER).unlink()
        assert same_tensors(load_mixture(folder).router, before.router)

    def test_a_pickle_with_code_is_refused_and_not_run(self, folder: Path, tmp_path: Path) -> None:
        class Code:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "ran"),)

        (folder / CLASSIFIER).unlink()
        torch.save({"last.weight": Code()}, folder / "xlora_classifier.pt")
        with pytest.raises(CorruptCheckpointError, match=r"xlora_classifier\.pt"):
            load_mixture(folder)
        assert not (tmp_path / "ran").exists()

    def test_experts_as_a_mapping(self, folder: Path) -> None:
        before = load_mixture(folder)
        edit_original(folder, adapters={"math": "user/of-a-training", "code": "experts/one"})
        (folder / "experts").mkdir()
        (folder / "code").rename(folder / "experts" / "one")
        after = load_mixture(folder)
        assert all(map(same_expert, after.experts, before.experts))
        assert after.config.adapters == {"math": "user/of-a-training", "code": "experts/one"}

    def test_experts_that_the_caller_names(self, folder: Path, experts: Any) -> None:
        before = load_mixture(folder)
        edit_original(folder, "adapters")
        shutil.rmtree(folder / "math")
        with pytest.raises(ConfigurationError, match="names its experts") as caught:
            load_mixture(folder)
        assert "adapters=" in caught.value.remedy
        after = load_mixture(folder, adapters={"first": experts("llama")["math"], "second": folder / "code"})
        assert list(after.config.adapters) == ["first", "second"]
        assert same_tensors(after.experts[1].base_weights, before.experts[1].base_weights)
        with pytest.raises(CorruptCheckpointError, match="with 1 experts on 14 layers"):
            load_mixture(folder, adapters={"first": experts("llama")["math"]})

    def test_experts_are_replaced_as_in_any_mixture(self, folder: Path, experts: Any) -> None:
        mixture = load_mixture(folder, adapters={"code": experts("llama")["prose"]})
        assert [expert.config.r for expert in mixture.experts] == [2, 4]

    def test_an_expert_called_default_lies_at_the_top(self, folder: Path) -> None:
        before = load_mixture(folder)
        for file in (folder / "math").iterdir():
            file.rename(folder / file.name)
        (folder / "math").rmdir()
        edit_original(folder, adapters=["default", "code"])
        assert detect(folder) == "mixture"
        after = load_mixture(folder)
        assert [expert.name for expert in after.experts] == ["default", "code"]
        assert same_tensors(vars(after.experts[0])["base_weights"], before.experts[0].base_weights)
        assert after.experts[0].config == before.experts[0].config

    def test_an_expert_that_is_nowhere_is_named(self, folder: Path) -> None:
        shutil.rmtree(folder / "code")
        with pytest.raises(IncompleteCheckpointError, match="'code'"):
            load_mixture(folder)

    def test_the_base_model_by_its_name(self, folder: Path, tmp_path: Path) -> None:
        llama().save_pretrained(tmp_path / "base")
        edit_original(folder, base_model_id=str(tmp_path / "base"))
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert_close(logits_of(model), forward_of_original(llama(), folder, tokens()), atol=1e-5, rtol=1e-5)

    def test_its_configuration_is_not_pefts(self, folder: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="original xlora library") as caught:
            PeftConfig.from_pretrained(folder)
        assert "loramix convert" in caught.value.remedy


class TestFields:
    def test_those_of_old_versions_are_warned_about(self, folder: Path) -> None:
        edit_original(folder, stop_token_id=None)
        load_mixture(folder)
        edit_original(folder, use_mean_pool=False)
        with pytest.warns(UserWarning, match=r"January 2024 \(stop_token_id, use_mean_pool\)"):
            load_mixture(folder)

    def test_one_routing_for_a_whole_text_is_refused(self, folder: Path) -> None:
        edit_original(folder, use_mean_pool=True)
        with pytest.raises(ConfigurationError, match="use_mean_pool=True"):
            load_mixture(folder)

    def test_what_old_versions_lack_has_the_default_of_the_last_and_is_said(self, folder: Path) -> None:
        edit_original(folder, "scaling_pass_value", "use_bias")
        with pytest.warns(UserWarning, match=r"lacks .* use_bias=True, scaling_pass_value=0\.0\."):
            assert load_mixture(folder).config.use_bias

    def test_unknown_ones_are_told(self, folder: Path) -> None:
        edit_original(folder, of_tomorrow=1, device="cuda")
        with pytest.warns(UserWarning, match=r"not known: of_tomorrow\."):
            load_mixture(folder)

    @pytest.mark.parametrize(
        ("change", "error", "named"),
        [
            ({"hidden_size": None}, ConfigurationError, "hidden_size=None"),
            ({"xlora_depth": 0}, ConfigurationError, "xlora_depth=0 in "),
            ({"use_bias": "no"}, ConfigurationError, "use_bias='no' in "),
            ({"adapters": [1, "code"]}, ConfigurationError, r"adapters=\[1, 'code'\]"),
            ({"adapters": "math"}, ConfigurationError, "adapters='math'"),
            ({"adapters": ["math", "math"]}, AdapterNameError, "'math' twice"),
            ({"adapters": ["math", "../code"]}, AdapterNameError, "'../code'"),
            ({"base_model_id": 3}, ConfigurationError, "base_model_name_or_path=3"),
        ],
    )
    def test_bad_values(self, change: Any, error: type[LoramixError], named: str, folder: Path) -> None:
        edit_original(folder, **change)
        with pytest.raises(error, match=named) as caught:
            load_mixture(folder)
        assert CONFIG in str(caught.value)

    @pytest.mark.parametrize(
        "change",
        [
            {"enable_softmax_topk": True, "enable_softmax": False, "top_k_lora": 1},
            {"top_k_lora": 1, "scaling_pass_value": 0.5},
        ],
    )
    def test_scalings_that_loramix_computes_otherwise_are_refused(self, change: Any, folder: Path) -> None:
        edit_original(folder, **change)
        with pytest.raises(ConfigurationError, match="original library") as caught:
            load_mixture(folder)
        assert "config=" in caught.value.remedy
        own = XLoraConfig(hidden_size=64, adapters={"math": "math", "code": "code"}, layerwise_scalings=True, **change)
        assert load_mixture(folder, config=own).config.top_k_lora == 1

    def test_top_k_of_all_selects_nothing(self, folder: Path) -> None:
        edit_original(folder, top_k_lora=2, scaling_pass_value=0.5)
        assert load_mixture(folder).config.top_k_lora == 2


class TestTheClassifiersFile:
    @pytest.mark.parametrize(
        ("change", "error", "named"),
        [
            ({"use_bias": True}, IncompleteCheckpointError, "without inner.0.bias"),
            ({"enable_relu_and_dropout": True}, IncompleteCheckpointError, r"without inner\.3.* unexpected: inner\.1"),
            ({"xlora_depth": 4}, IncompleteCheckpointError, r"without inner\.2\.weight, with xlora_depth=4"),
            ({"xlora_depth": 2}, CorruptCheckpointError, r"inner\.1\.weight, with xlora_depth=2"),
            ({"xlora_size": 4}, CorruptCheckpointError, r"expected \(4, 64\), found \(8, 64\)"),
            ({"layerwise_scalings": False}, CorruptCheckpointError, r"expected \(2, 8\), found \(28, 8\)"),
        ],
    )
    def test_what_the_configuration_does_not_ask_for(
        self, change: Any, error: type[CheckpointError], named: str, experts: Any, tmp_path: Path
    ) -> None:
        settings = {"xlora_depth": 3, "enable_relu_and_dropout": False, "use_bias": False, "layerwise_scalings": True}
        folder = write_original(tmp_path / "original", two(experts), LAYERS, xlora_size=8, **settings)
        edit_original(folder, **change)
        with pytest.raises(error, match=named) as caught:
            load_mixture(folder)
        assert str(folder / CLASSIFIER) in caught.value.received
        assert "PEFT" not in str(caught.value)

    def test_it_is_missing(self, folder: Path) -> None:
        (folder / CLASSIFIER).unlink()
        with pytest.raises(CheckpointNotFoundError, match=r"xlora_classifier\.safetensors or xlora_classifier\.pt"):
            load_mixture(folder)

    @pytest.mark.parametrize(
        ("hidden", "depth", "names", "layers"),
        [(4096, 1, [str(i) for i in range(1, 10)], 160), (3072, 2, ["a", "b", "c", "d"], 196)],
    )
    def test_the_published_shapes(self, hidden: int, depth: int, names: list[str], layers: int, tmp_path: Path) -> None:
        modules = [f"model.layers.{i // 7}.part{i % 7}" for i in range(layers)]
        for i, name in enumerate(names):
            save_adapter(tmp_path / name, make_expert(name, seed=i, r=1, modules=modules[: layers - i]))
        config = write_original(tmp_path, {}, layers, hidden, layerwise_scalings=True, xlora_depth=depth) / CONFIG
        edit_original(tmp_path, adapters=names, stop_token_id=None)
        tensors = classifier_of(json.loads(config.read_text()), len(names), layers, dtype=torch.bfloat16)
        save_file(tensors, tmp_path / CLASSIFIER)
        mixture = load_mixture(tmp_path)
        assert mixture.router[f"layers.{3 * (depth - 1)}.weight"].shape == (
            layers * len(names),
            2048 if depth > 1 else hidden,
        )
        assert {tensor.dtype for tensor in mixture.router.values()} == {torch.bfloat16}
        description = describe(tmp_path)
        assert (description.num_layers, description.num_experts) == (layers, len(names))
        assert description.router.parameters == sum(tensor.numel() for tensor in tensors.values())
        shutil.rmtree(tmp_path / names[0])
        save_adapter(tmp_path / names[0], make_expert(names[0], r=1, modules=modules[:-1]))
        with pytest.raises(CorruptCheckpointError, match=rf"{len(names)} experts on {layers - 1} layers"):
            load_mixture(tmp_path)


class TestExperts:
    @pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}], ids=str)
    def test_what_the_library_ignores_or_cannot_run_is_refused(self, settings: Any, tmp_path: Path) -> None:
        config, router, experts = make_mixture()
        save_mixture(tmp_path / "mixture", config, router, experts, format="original")
        shutil.rmtree(tmp_path / "mixture" / "code")
        changed = make_expert("code", **settings)
        save_adapter(tmp_path / "mixture" / "code", changed)
        named = f"'code' with {next(iter(settings))}=True"
        with pytest.raises(UnsupportedAdapterError, match=named):
            load_mixture(tmp_path / "mixture")
        with pytest.raises(UnsupportedOperationError, match=named):
            save_mixture(tmp_path / "new", config, router, [experts[0], changed], format="original")
        assert not (tmp_path / "new").exists()


class TestWriting:
    def test_the_layout(self, tmp_path: Path) -> None:
        config, router, experts = make_mixture(xlora_depth=3, xlora_size=8, base_model_name_or_path="user/base")
        config.adapters = {"math": "user/math@v1", "code": str(tmp_path)}
        save_mixture(tmp_path / "saved", config, router, experts, format="original")
        assert set(contents(tmp_path / "saved")) == {
            CONFIG,
            CLASSIFIER,
            *(f"{n}/{f}" for n in ("math", "code") for f in ("adapter_config.json", "adapter_model.safetensors")),
        }
        saved = load_file(tmp_path / "saved" / CLASSIFIER)
        keys = ["inner.0", "inner.3", "last"]
        assert set(saved) == {f"{key}.{part}" for key in keys for part in ("weight", "bias")}
        assert torch.equal(saved["last.bias"], router["layers.6.bias"])
        values = json.loads((tmp_path / "saved" / CONFIG).read_text())
        assert values["base_model_id"] == "user/base"
        assert values["adapters"] == {"math": "user/math@v1", "code": "code"}
        assert set(values) == set(json.loads((SAVED / CONFIG).read_text()))

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"router": "static"}, "router='static'"),
            ({"gating": "other", "gating_settings": {"a": 1}}, "gating='other'; gating_settings={'a': 1}"),
            ({"elsewhere": {"vision": "uniform"}}, "elsewhere={'vision': 'uniform'}"),
            ({"enable_softmax_topk": True, "enable_softmax": False, "top_k_lora": 1}, "enable_softmax_topk=True"),
            ({"top_k_lora": 1, "scaling_pass_value": 0.5}, "top_k_lora=1 with scaling_pass_value=0.5"),
        ],
    )
    def test_what_it_cannot_hold_is_refused_by_name(self, settings: Any, named: str, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedOperationError) as caught:
            save_mixture(tmp_path / "saved", *make_mixture(**settings), format="original")
        assert caught.value.received == named
        assert not (tmp_path / "saved").exists()

    def test_the_base_model_is_that_of_the_experts_where_the_mixture_names_none(self, tmp_path: Path) -> None:
        save_mixture(tmp_path, *make_mixture(), format="original")
        assert json.loads((tmp_path / CONFIG).read_text())["base_model_id"] == "user/base"

    def test_weights_of_its_own_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedOperationError, match=r"lm_head\.weight"):
            save_mixture(tmp_path, *make_mixture(), base_weights={"lm_head.weight": torch.ones(1)}, format="original")

    def test_it_replaces_its_own_and_nothing_else(self, tmp_path: Path) -> None:
        save_mixture(tmp_path / "own", *make_mixture(), format="original")
        save_mixture(tmp_path / "own", *make_mixture(seed=5), format="original")
        assert same_tensors(load_mixture(tmp_path / "own").router, make_mixture(seed=5)[1])
        library = shutil.copytree(SAVED, tmp_path / "library")
        save_mixture(tmp_path / "peft", *make_mixture())
        save_adapter(tmp_path / "experts" / "math", make_expert("math"))
        for place in (library, tmp_path / "peft", tmp_path / "experts"):
            before = contents(place)
            with pytest.raises(SaveError):
                save_mixture(place, *make_mixture(), format="original")
            assert contents(place) == before
        with pytest.raises(SaveError, match="original library"):
            save_mixture(tmp_path / "own", *make_mixture(names=("other", "names")))
