"""Configurations: PEFT's fields and files, an expert's rules, and what a broken file says."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest

from loramix.config.base import PeftConfig, PeftType, TaskType
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import (
    AdapterNameError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    SaveError,
    UnsupportedAdapterError,
)
from support.checkpoints import xlora_config

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft


def write(folder, content):
    (folder / "adapter_config.json").write_text(content if isinstance(content, str) else json.dumps(content))


class TestAgainstPeft:
    @pytest.mark.parametrize("name", ["LoraConfig", "XLoraConfig"])
    def test_fields_and_defaults_are_peft_s(self, name):
        ours, theirs = {"LoraConfig": LoraConfig, "XLoraConfig": XLoraConfig}[name], getattr(peft, name)
        beyond = ["router", "gating", "gating_settings", "elsewhere", "use_bias", "enable_relu_and_dropout"]
        own = beyond if name == "XLoraConfig" else []
        assert [entry.name for entry in dataclasses.fields(ours)] == [
            *(entry.name for entry in dataclasses.fields(theirs)),
            *own,
        ]
        settings = {"hidden_size": 64, "adapters": {}} if name == "XLoraConfig" else {}
        assert ours(**settings).to_dict() | {"peft_version": None} == theirs(**settings).to_dict() | {
            "peft_version": None
        }

    def test_enumerations_are_peft_s(self):
        assert [task.value for task in TaskType] == [task.value for task in peft.TaskType]
        assert all(peft.PeftType(kind.value) == kind.value for kind in PeftType if kind is not PeftType.LORAMIX)

    def test_peft_reads_our_lora_file(self, tmp_path):
        config = LoraConfig(
            r=4,
            lora_alpha=7,
            target_modules=["q_proj", "v_proj"],
            exclude_modules=["0.q_proj"],
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 3.5},
            use_rslora=True,
            layers_to_transform=[0, 1],
            layers_pattern=["layers"],
            task_type="CAUSAL_LM",
            base_model_name_or_path="user/base",
        )
        config.save_pretrained(tmp_path)
        theirs = peft.LoraConfig.from_pretrained(tmp_path)
        assert theirs.to_dict() | {"peft_version": None} == config.to_dict()

    def test_peft_reads_our_xlora_file(self, tmp_path):
        config = xlora_config(xlora_depth=3, top_k_lora=1, layerwise_scalings=True, task_type=TaskType.CAUSAL_LM)
        config.save_pretrained(tmp_path)
        theirs = peft.XLoraConfig.from_pretrained(tmp_path)
        assert theirs.to_dict() | {"peft_version": None} == config.to_dict()
        assert list(theirs.adapters) == ["math", "code"]

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_modules": ["v", "q"], "use_dora": True},
            {"target_modules": ".*q", "init_lora_weights": "eva", "eva_config": peft.tuners.lora.EvaConfig()},
            {"init_lora_weights": "gaussian", "bias": "all", "modules_to_save": ["lm_head"]},
            {"layer_replication": [[0, 2], [1, 2]], "trainable_token_indices": {"embed_tokens": [1]}},
            {"use_qalora": True, "qalora_group_size": 8, "megatron_core": None},
        ],
    )
    def test_any_peft_file_reads_and_is_written_back_as_it_was(self, tmp_path, settings):
        theirs = peft.LoraConfig(r=3, **settings)
        theirs.save_pretrained(tmp_path)
        ours = PeftConfig.from_pretrained(tmp_path)
        assert isinstance(ours, LoraConfig)
        before = json.loads((tmp_path / "adapter_config.json").read_text())
        ours.save_pretrained(tmp_path)
        after = json.loads((tmp_path / "adapter_config.json").read_text())
        for name in ("target_modules", "exclude_modules"):
            before[name] = sorted(before[name]) if isinstance(before[name], list) else before[name]
        assert after == before

    def test_peft_s_xlora_file_is_written_back_byte_for_byte(self, tmp_path):
        peft.XLoraConfig(hidden_size=64, adapters={"math": "a", "code": "b"}, top_k_lora=1).save_pretrained(tmp_path)
        before = (tmp_path / "adapter_config.json").read_bytes()
        PeftConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").read_bytes() == before

    @pytest.mark.parametrize("settings", [{"router": "static"}, {"gating": "other"}, {"gating_settings": {"alpha": 2}}])
    def test_peft_refuses_a_router_or_a_gating_that_it_does_not_have(self, tmp_path, settings):
        xlora_config(**settings).save_pretrained(tmp_path)
        for reader in (peft.PeftConfig, peft.XLoraConfig):
            with pytest.raises(KeyError, match="LORAMIX"):
                reader.from_pretrained(tmp_path)


class TestFiles:
    def test_layout_is_sorted_and_stable(self):
        text = LoraConfig(target_modules=["b", "a", "c"]).to_json()
        assert json.loads(text)["target_modules"] == ["a", "b", "c"]
        assert list(json.loads(text)) == sorted(json.loads(text))
        assert "runtime_config" not in text
        assert text.startswith('{\n  "alora_invocation_tokens": null,\n')

    def test_adapters_keep_their_order(self, tmp_path):
        xlora_config(adapters={"1": "x", "0": "y"}).save_pretrained(tmp_path)
        assert list(XLoraConfig.from_pretrained(tmp_path).adapters.items()) == [("1", "x"), ("0", "y")]

    def test_the_base_class_dispatches(self, tmp_path):
        xlora_config().save_pretrained(tmp_path)
        assert type(PeftConfig.from_pretrained(tmp_path)) is XLoraConfig
        assert type(PeftConfig.from_pretrained(tmp_path.parent, subfolder=tmp_path.name)) is XLoraConfig

    def test_fields_of_a_later_peft_are_ignored_with_a_warning(self, tmp_path):
        write(tmp_path, {"peft_type": "LORA", "r": 3, "shiny_new": 1})
        with pytest.warns(UserWarning, match=r"shiny_new\. They are ignored"):
            assert LoraConfig.from_pretrained(tmp_path).r == 3

    def test_runtime_config_is_not_stored(self, tmp_path):
        write(tmp_path, {"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}})
        assert LoraConfig.from_pretrained(tmp_path).runtime_config is None

    def test_unknown_keyword_names_the_known_ones(self, tmp_path):
        with pytest.raises(ConfigurationError, match="colour") as caught:
            LoraConfig.from_pretrained(tmp_path, colour="red")
        assert "revision" in caught.value.remedy

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            ("", "Expecting value"),
            ('{"peft_type": "LORA", "r": ', "Expecting value"),
            ("[1, 2]", "a list"),
            ('"LORA"', "a str"),
            ('{"r": 8}', "peft_type=None"),
            ('{"peft_type": 3}', "peft_type=3"),
            ('{"peft_type": "LORA", "r": 1, "r": 2}', "'r' twice"),
            ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "Expecting value"),
        ],
    )
    def test_a_broken_file_is_named(self, tmp_path, content, found):
        write(tmp_path, content)
        with pytest.raises(CorruptCheckpointError) as caught:
            PeftConfig.from_pretrained(tmp_path)
        assert str(tmp_path / "adapter_config.json") in caught.value.received
        assert found in caught.value.received
        assert caught.value.remedy

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(CorruptCheckpointError, match="utf-8"):
            PeftConfig.from_pretrained(tmp_path)

    def test_two_experts_of_one_name_in_the_file(self, tmp_path):
        write(tmp_path, '{"peft_type": "XLORA", "hidden_size": 8, "adapters": {"math": "a", "math": "b"}}')
        with pytest.raises(AdapterNameError, match="'math' twice") as caught:
            PeftConfig.from_pretrained(tmp_path)
        assert str(tmp_path) in caught.value.received

    def test_a_bad_value_names_its_file(self, tmp_path):
        write(tmp_path, {"peft_type": "LORA", "r": 0})
        with pytest.raises(ConfigurationError, match="r=0 in") as caught:
            LoraConfig.from_pretrained(tmp_path)
        assert str(tmp_path) in caught.value.received

    @pytest.mark.parametrize(
        ("other", "found"),
        [(None, "has none"), ("config.json", "a model's folder"), ("xlora_config.json", "original xlora library")],
    )
    def test_a_folder_without_an_adapter(self, tmp_path, other, found):
        if other:
            (tmp_path / other).write_text("{}")
        with pytest.raises(CheckpointNotFoundError, match=found) as caught:
            PeftConfig.from_pretrained(tmp_path)
        assert str(tmp_path) in caught.value.received
        assert "adapter_config.json" in caught.value.rule

    def test_the_other_kind_is_refused(self, tmp_path):
        xlora_config().save_pretrained(tmp_path / "x")
        LoraConfig().save_pretrained(tmp_path / "l")
        with pytest.raises(CheckpointError, match="'XLORA'") as caught:
            LoraConfig.from_pretrained(tmp_path / "x")
        assert "XLoraConfig.from_pretrained" in caught.value.remedy
        with pytest.raises(CheckpointError, match="'LORA'"):
            XLoraConfig.from_pretrained(tmp_path / "l")

    @pytest.mark.parametrize("kind", ["PREFIX_TUNING", "IA3", "ADALORA"])
    def test_other_adapters_are_refused_by_name(self, tmp_path, kind):
        write(tmp_path, {"peft_type": kind})
        with pytest.raises(UnsupportedAdapterError, match=kind):
            PeftConfig.from_pretrained(tmp_path)

    def test_saving_where_a_file_lies(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(SaveError, match="file") as caught:
            LoraConfig().save_pretrained(tmp_path / "file")
        assert isinstance(caught.value.__cause__, OSError)
        assert (tmp_path / "file").read_text() == "mine"


class TestLora:
    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"r": 0}, "r=0"),
            ({"r": "8"}, "r='8'"),
            ({"rank_pattern": {"q": 0}}, "rank_pattern['q']=0"),
            ({"alpha_pattern": {"q": "x"}}, "alpha_pattern['q']='x'"),
            ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
            ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
            ({"bias": "some"}, "bias='some'"),
            ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head'"),
            ({"modules_to_save": ["a", 3]}, "modules_to_save=['a', 3]"),
            ({"trainable_token_indices": 5}, "trainable_token_indices=5"),
            ({"trainable_token_indices": {"wte": ["5"]}}, "trainable_token_indices=['5']"),
            ({"target_modules": "(", "r": 8}, "'('"),
            ({"exclude_modules": "("}, "'('"),
            ({"rank_pattern": {"(": 1}}, "'('"),
            ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform=[0]"),
            ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern='h'"),
            ({"use_dora": True, "lora_bias": True}, "use_dora=True, lora_bias=True"),
        ],
    )
    def test_what_cannot_work_is_an_error_that_names_it(self, settings, named):
        with pytest.raises(ConfigurationError) as caught:
            LoraConfig(**settings)
        assert named in caught.value.received
        assert caught.value.remedy

    def test_lists_of_modules_become_sets(self):
        config = LoraConfig(target_modules=["q", "v", "q"], exclude_modules=["k"])
        assert (config.target_modules, config.exclude_modules) == ({"q", "v"}, {"k"})

    def test_a_changed_dictionary_changes_nothing(self):
        config = LoraConfig(rank_pattern={"q": 2})
        config.to_dict()["rank_pattern"]["q"] = 99
        assert config.rank_pattern == {"q": 2}
