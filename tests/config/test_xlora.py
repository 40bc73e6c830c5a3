"""The configuration of a mixture: its rules, its router and gating, a hidden size that was not given."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

from loramix.config.base import PeftConfig, PeftType
from loramix.config.names import check_expert_names
from loramix.config.xlora import XLoraConfig
from loramix.errors import AdapterNameError, ConfigurationError
from support.checkpoints import xlora_config

EXPERTS = {"math": "a", "code": "b"}


def write(folder, **content):
    (folder / "adapter_config.json").write_text(json.dumps(content))


class TestXLora:
    def test_what_was_not_given_is_said_at_the_caller_s_line(self):
        with pytest.warns(UserWarning, match="was not given") as seen:
            config = XLoraConfig()
        assert (config.hidden_size, config.adapters, config.hidden_size_given) == (4096, {}, False)
        assert [str(warning.message).split()[0] for warning in seen] == ["hidden_size", "adapters"]
        assert {warning.filename for warning in seen} == {__file__}

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"enable_softmax_topk": True, "enable_softmax": False}, "without top_k_lora"),
            ({"enable_softmax_topk": True, "top_k_lora": 1}, "performs worse"),
            ({"top_k_lora": 0}, "at least 1"),
        ],
    )
    def test_doubtful_settings_warn_once(self, settings, message):
        with pytest.warns(UserWarning, match=message) as seen:
            xlora_config(**settings)
        assert len(seen) == 1

    def test_good_settings_are_silent(self):
        config = xlora_config(top_k_lora=2, enable_softmax_topk=True, enable_softmax=False, softmax_temperature=0.5)
        assert config.peft_type is PeftType.XLORA
        assert config.hidden_size_given

    def test_the_type_cannot_be_chosen(self):
        assert xlora_config(peft_type="LORA").peft_type is PeftType.XLORA

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"xlora_depth": 0}, "xlora_depth=0"),
            ({"xlora_depth": 1.5}, "xlora_depth=1.5"),
            ({"xlora_depth": True}, "xlora_depth=True"),
            ({"xlora_depth": 2, "xlora_size": 0}, "xlora_size=0"),
            ({"xlora_depth": 2, "xlora_dropout_p": 1.0}, "xlora_dropout_p=1.0"),
            ({"xlora_depth": 2, "xlora_dropout_p": -0.1}, "xlora_dropout_p=-0.1"),
            ({"softmax_temperature": 0}, "softmax_temperature=0"),
            ({"softmax_temperature": -1.0}, "softmax_temperature=-1.0"),
            ({"softmax_temperature": float("inf")}, "softmax_temperature=inf"),
            ({"softmax_temperature": float("nan")}, "softmax_temperature=nan"),
            ({"hidden_size": 0}, "hidden_size=0"),
            ({"top_k_lora": 1.0}, "top_k_lora=1.0"),
            ({"scaling_pass_value": float("nan")}, "scaling_pass_value=nan"),
            ({"global_scaling_weight": "1"}, "global_scaling_weight='1'"),
            ({"layerwise_scalings": "false"}, "layerwise_scalings='false'"),
            ({"task_type": "POETRY"}, "task_type='POETRY'"),
            ({"adapters": ["a"]}, "adapters=['a']"),
            ({"adapters": {"math": None}}, "adapters['math']=None"),
        ],
    )
    def test_what_cannot_work_is_an_error_that_names_it(self, settings, named):
        with pytest.raises(ConfigurationError) as caught:
            xlora_config(**settings)
        field = next(iter(settings)) if len(settings) == 1 else list(settings)[-1]
        assert named in caught.value.received
        assert caught.value.rule.startswith(field) or field == "adapters"
        assert caught.value.remedy

    def test_size_and_dropout_matter_only_with_depth(self):
        assert xlora_config(xlora_depth=1, xlora_size=0, xlora_dropout_p=2.0).xlora_size == 0

    def test_names_that_cannot_be_folders(self):
        with pytest.raises(AdapterNameError, match=r"\.\./x"):
            xlora_config(adapters={"../x": "a"})

    def test_paths_become_strings(self, tmp_path):
        assert xlora_config(adapters={"math": tmp_path}).adapters == {"math": str(tmp_path)}

    def test_adapters_are_a_copy(self):
        given = dict(EXPERTS)
        config = xlora_config(adapters=given)
        config.adapters["more"] = "c"
        assert given == EXPERTS

    @pytest.mark.parametrize(
        ("settings", "experts", "hidden", "named"),
        [
            ({}, 0, 64, "adapters="),
            ({"top_k_lora": 3}, 2, 64, "top_k_lora=3"),
            ({"hidden_size": 32}, 2, 64, "hidden_size=32"),
        ],
    )
    def test_rules_known_when_the_model_is_built(self, settings, experts, hidden, named):
        config = xlora_config(**settings)
        with pytest.raises(ConfigurationError) as caught:
            config.validate_for(experts, hidden)
        assert named in caught.value.received
        assert caught.value.remedy

    def test_top_k_below_one_is_an_error_when_the_model_is_built(self):
        with pytest.warns(UserWarning, match="top_k_lora"):
            config = xlora_config(top_k_lora=0)
        with pytest.raises(ConfigurationError, match="top_k_lora=0"):
            config.validate_for(2, 64)

    @pytest.mark.parametrize("k", [None, 1, 2])
    def test_what_fits_passes(self, k):
        xlora_config(top_k_lora=k).validate_for(2, 64)

    def test_live_changes_are_checked_again(self):
        config = xlora_config()
        config.softmax_temperature = 0.0
        with pytest.raises(ConfigurationError, match="softmax_temperature"):
            config.validate_for(2, 64)


class TestRouterAndGating:
    OTHERS = (
        {"router": "static"},
        {"gating": "other", "gating_settings": {"alpha": 1.5, "by": "layer", "limit": None}},
        {"router": "static", "gating": "other"},
        {"use_bias": False, "enable_relu_and_dropout": False},
    )

    @pytest.mark.parametrize("settings", OTHERS)
    def test_the_file_keeps_them(self, tmp_path, settings):
        config = xlora_config(**settings)
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["peft_type"] == "LORAMIX"
        own = ("router", "gating", "gating_settings", "use_bias", "enable_relu_and_dropout")
        assert {name: saved[name] for name in own if name in saved} == settings
        for reader in (PeftConfig, XLoraConfig):
            again = reader.from_pretrained(tmp_path)
            assert (type(again), again) == (XLoraConfig, config)

    def test_the_type_follows_the_fields(self):
        config = xlora_config()
        assert config.peft_type is PeftType.XLORA
        config.router = "static"
        assert config.peft_type is PeftType.LORAMIX
        config.router, config.gating = "classifier", "other"
        assert config.peft_type is PeftType.LORAMIX
        assert config.to_dict()["peft_type"] is PeftType.LORAMIX
        config.gating = "xlora"
        assert config.peft_type is PeftType.XLORA
        config.peft_type = PeftType.LORA
        assert config.peft_type is PeftType.XLORA

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, dataclasses.replace, lambda config: pickle.loads(pickle.dumps(config))],
        ids=["copy", "deepcopy", "replace", "pickle"],
    )
    def test_every_copy_keeps_them(self, duplicate):
        again = duplicate(xlora_config(router="static"))
        assert (again.router, again.peft_type) == ("static", PeftType.LORAMIX)

    def test_the_fields_say_what_a_file_is_even_where_its_type_says_xlora_config(self, tmp_path):
        """Nothing else can be meant by a router's name; saved again, the file has the type that PEFT refuses."""
        write(tmp_path, peft_type="XLORA", hidden_size=8, adapters={}, router="static")
        config = PeftConfig.from_pretrained(tmp_path)
        assert (config.router, config.peft_type) == ("static", PeftType.LORAMIX)

    def test_a_file_of_type_loramix_without_what_makes_it_one(self, tmp_path):
        write(tmp_path, peft_type="LORAMIX", hidden_size=8, adapters={}, router="classifier")
        with pytest.raises(ConfigurationError, match="LORAMIX") as caught:
            PeftConfig.from_pretrained(tmp_path)
        assert "router='classifier'" in caught.value.received
        assert str(tmp_path) in caught.value.received
        assert "XLORA" in caught.value.remedy

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"router": ""}, "router=''"),
            ({"router": " "}, "router=' '"),
            ({"router": None}, "router=None"),
            ({"gating": 3}, "gating=3"),
            ({"gating_settings": 0.3}, "gating_settings=0.3"),
            ({"gating_settings": {3: 0.3}}, "gating_settings={3: 0.3}"),
            ({"gating_settings": {"limits": [1]}}, "gating_settings={'limits': [1]}"),
            ({"router": "static", "xlora_depth": 2}, "xlora_depth=2"),
            ({"router": "static", "xlora_size": 8}, "xlora_size=8"),
            ({"router": "static", "xlora_dropout_p": 0.0}, "xlora_dropout_p=0.0"),
            ({"router": "static", "use_bias": False}, "use_bias=False"),
            ({"use_bias": "no"}, "use_bias='no'"),
            ({"enable_relu_and_dropout": 0}, "enable_relu_and_dropout=0"),
        ],
    )
    def test_what_cannot_work_is_an_error_that_names_it(self, settings, named):
        with pytest.raises(ConfigurationError) as caught:
            xlora_config(**settings)
        assert named in caught.value.received
        assert caught.value.remedy

    def test_the_classifier_s_settings_go_with_any_gating(self):
        assert xlora_config(gating="other", xlora_depth=2, xlora_size=8, xlora_dropout_p=0.0).xlora_depth == 2

    def test_the_hidden_size_may_be_left_out_without_a_warning(self, tmp_path):
        config = XLoraConfig(adapters=EXPERTS, router="static")
        assert (config.hidden_size_given, config.hidden_size) == (False, 4096)
        config.validate_for(2, 64)
        config.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["hidden_size"] is None
        assert XLoraConfig.from_pretrained(tmp_path) == config


class TestHiddenSizeNotGiven:
    @pytest.fixture
    def config(self):
        with pytest.warns(UserWarning, match="hidden_size"):
            return XLoraConfig(adapters=EXPERTS)

    @pytest.mark.parametrize(
        "duplicate",
        [copy.copy, copy.deepcopy, dataclasses.replace, lambda config: pickle.loads(pickle.dumps(config))],
        ids=["copy", "deepcopy", "replace", "pickle"],
    )
    def test_every_copy_remembers(self, config, duplicate):
        again = duplicate(config)
        assert (again.hidden_size, again.hidden_size_given) == (4096, False)
        again.validate_for(2, 64)

    def test_the_file_remembers(self, config, tmp_path):
        config.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="hidden_size"):
            again = XLoraConfig.from_pretrained(tmp_path)
        assert not again.hidden_size_given
        assert again == config

    def test_the_dictionary_holds_a_plain_number(self, config):
        assert type(config.to_dict()["hidden_size"]) is int
        assert "hidden_size=4096" in repr(config)

    def test_assigning_it_gives_it(self, config):
        config.hidden_size = 4096
        assert config.hidden_size_given
        with pytest.raises(ConfigurationError, match="4096"):
            config.validate_for(2, 64)


def test_expert_names_of_a_configuration_are_checked_by_the_public_helper():
    check_expert_names(xlora_config().adapters)
