"""Reading mixtures: ours, PEFT's, with other experts, and every way in which they can be wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from loramix.config.xlora import XLoraConfig
from loramix.errors import (
    AdapterNameError,
    CheckpointNotFoundError,
    ConfigurationError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
)
from loramix.files.hub import HubOptions
from loramix.formats import describe, detect, load_adapter, load_mixture, save_adapter, save_mixture
from loramix.routers import RouterSizes, XLoraClassifier
from support.checkpoints import (
    HIDDEN,
    edit_config,
    edit_tensors,
    make_expert,
    make_mixture,
    same_expert,
    same_tensors,
    tiny_llama,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.internal_xlora_classifier."


def as_peft(folder, tmp_path):
    """Turn a mixture of ours into one as PEFT lays it out: the experts elsewhere, by path."""
    places = {name: tmp_path / "elsewhere" / name for name in ("math", "code")}
    for name, place in places.items():
        place.parent.mkdir(exist_ok=True)
        (folder / name).rename(place)
    edit_config(folder, adapters={name: str(place) for name, place in places.items()})
    return folder


class TestRoundTrip:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"xlora_depth": 1, "layerwise_scalings": True},
            {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.1},
            {"xlora_depth": 4, "xlora_size": 8, "xlora_dropout_p": 0.0, "layerwise_scalings": True},
            {"top_k_lora": 1, "enable_softmax": False, "scaling_pass_value": 0.333, "global_scaling_weight": 0.5},
            {"names": ("1", "0")},
            {"names": ("médecine", "数学", "a.b")},
        ],
    )
    def test_what_is_saved_is_loaded_bit_by_bit(self, tmp_path, settings):
        config, classifier, experts = make_mixture(**settings)
        save_mixture(tmp_path, config, classifier, experts)
        again = load_mixture(tmp_path)
        assert again.config == config
        assert list(again.config.adapters) == list(config.adapters)
        assert same_tensors(again.router, classifier)
        assert [expert.name for expert in again.experts] == [expert.name for expert in experts]
        assert all(same_expert(one, two) for one, two in zip(experts, again.experts, strict=True))

    def test_the_layout(self, folder):
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        assert files == sorted(
            [CONFIG, WEIGHTS, *(f"{name}/{file}" for name in ("math", "code") for file in (CONFIG, WEIGHTS))]
        )
        assert set(load_file(folder / WEIGHTS)) == {
            f"{KEY}layers.{i}.{part}" for i in (0, 3) for part in ("weight", "bias")
        }

    def test_it_can_be_moved(self, folder, tmp_path):
        before = load_mixture(folder)
        shutil.move(folder, tmp_path / "moved")
        after = load_mixture(tmp_path / "moved")
        assert all(same_expert(one, two) for one, two in zip(before.experts, after.experts, strict=True))
        assert [expert.source for expert in after.experts] == [f"{tmp_path}/moved/{name}" for name in ("math", "code")]

    def test_hub_identifiers_are_kept_and_local_paths_become_folders(self, tmp_path):
        config, classifier, experts = make_mixture()
        config.adapters = {"math": "user/math@v1", "code": str(tmp_path / "somewhere")}
        save_mixture(tmp_path / "saved", config, classifier, experts)
        assert load_mixture(tmp_path / "saved").config.adapters == {"math": "user/math@v1", "code": "code"}
        assert config.adapters["code"] == str(tmp_path / "somewhere")

    def test_the_folder_s_experts_go_before_the_identifiers(self, folder, others):
        edit_config(folder, adapters={"math": str(others["new1"]), "code": str(others["new2"])})
        assert [expert.rank("model.layers.0.q") for expert in load_mixture(folder).experts] == [2, 3]

    def test_a_subfolder(self, folder):
        again = load_mixture(folder.parent, HubOptions(subfolder="mixture"))
        assert [expert.name for expert in again.experts] == ["math", "code"]

    def test_a_trainer_s_file_in_the_folder_changes_nothing(self, folder):
        before = load_mixture(folder)
        save_file({"internal_xlora_classifier.layers.0.weight": torch.zeros(1)}, folder / "model.safetensors")
        assert same_tensors(load_mixture(folder).router, before.router)


class TestPeft:
    def test_what_peft_drops_is_refused_and_said(self, peft_folder):
        with pytest.raises(IncompleteCheckpointError) as caught:
            load_mixture(peft_folder / "xlora")
        assert "layers.0.weight, layers.0.bias" in caught.value.received
        assert "PEFT 0.20 to 0.21.2 drop" in caught.value.received
        assert str(peft_folder / "xlora") in caught.value.received
        assert "PEFT 0.19.1" in caught.value.remedy

    @pytest.mark.filterwarnings("ignore")
    def test_the_remedy_brings_back_what_peft_dropped(self, peft_folder, tmp_path):
        import peft

        config = peft.XLoraConfig.from_pretrained(peft_folder / "xlora")
        model = peft.get_peft_model(tiny_llama(), config)
        model.save_pretrained(tmp_path)
        with pytest.raises(IncompleteCheckpointError, match=f"of PEFT {re.escape(peft.__version__)}") as caught:
            load_mixture(tmp_path)
        call = re.search(r"safetensors\.torch\.save_file\(.*\)(?=\. Otherwise)", caught.value.remedy)
        exec(call[0], {"safetensors": safetensors, "model": model})
        assert same_tensors(load_mixture(tmp_path).router, model.base_model.internal_xlora_classifier.state_dict())

    @pytest.mark.parametrize("version", ["0.18.1", "0.19.1"])
    def test_what_older_versions_saved_is_whole(self, version, tmp_path):
        folder = Path(__file__).parent / "peft_saved" / version
        modules = [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in ("q", "v")]
        for name in ("0", "1"):
            save_adapter(tmp_path / name, make_expert(name, modules=modules))
        mixture = load_mixture(folder, adapters={name: tmp_path / name for name in ("0", "1")})
        assert (mixture.config.peft_version, mixture.num_layers) == (version, 4)
        saved = {key.removeprefix(KEY): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
        assert same_tensors(mixture.router, saved)
        assert set(saved) == {f"layers.{i}.{part}" for i in (0, 3) for part in ("weight", "bias")}

    def test_a_complete_file_of_peft_s_is_read(self, peft_folder, tmp_path):
        folder = shutil.copytree(peft_folder / "xlora", tmp_path / "xlora")
        dropped = {f"{KEY}layers.0.weight": torch.ones(8, HIDDEN), f"{KEY}layers.0.bias": torch.ones(8)}
        edit_tensors(folder, lambda tensors: tensors | dropped)
        mixture = load_mixture(folder)
        assert set(mixture.router) == {"layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"}
        assert mixture.config.adapters == {"0": str(peft_folder / "plain"), "1": str(peft_folder / "rslora")}
        assert same_expert(mixture.experts[1], load_adapter("1", peft_folder / "rslora"))
        assert (folder / "1" / WEIGHTS).exists()

    def test_experts_that_peft_trained_and_did_not_save_are_warned_about(self, folder, tmp_path):
        edit_config(as_peft(folder, tmp_path), use_trainable_adapters=True)
        with pytest.warns(UserWarning, match=r"trained expert .* does not hold it") as seen:
            load_mixture(folder)
        assert [str(warning.message).split("'")[1] for warning in seen] == ["math", "code"]

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("depth", [1, 2, 4])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("layerwise", [False, True])
    def test_the_classifier_s_shapes_are_peft_s(self, depth, dropout, layerwise):
        import peft
        from peft.tuners.xlora.classifier import XLoraClassifier as TheirClassifier

        settings = {"hidden_size": HIDDEN, "xlora_depth": depth, "xlora_size": 8, "xlora_dropout_p": dropout}
        config = peft.XLoraConfig(adapters={}, layerwise_scalings=layerwise, **settings)
        theirs = TheirClassifier(torch.nn.Linear(1, 1), config, n_classes=3, n_layers=5, device="cpu")
        settings["layerwise_scalings"] = layerwise
        ours = XLoraClassifier.shapes(XLoraConfig(adapters={}, **settings), RouterSizes(HIDDEN, 5, 3))
        assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}

    def test_peft_reads_our_configurations(self, folder):
        import peft

        theirs = peft.PeftConfig.from_pretrained(folder)
        assert (type(theirs).__name__, list(theirs.adapters)) == ("XLoraConfig", ["math", "code"])
        assert type(peft.PeftConfig.from_pretrained(folder / "math")).__name__ == "LoraConfig"

    @pytest.mark.filterwarnings("ignore")
    def test_peft_reads_our_mixture_from_inside_its_folder(self, peft_folder, tmp_path, monkeypatch):
        import peft

        experts = [load_adapter(str(i), peft_folder / name) for i, name in enumerate(("plain", "rslora"))]
        settings = {"xlora_depth": 3, "xlora_size": 8, "names": ("0", "1")}
        config, classifier, _ = make_mixture(**settings)
        config.adapters = {"0": str(peft_folder / "plain"), "1": str(peft_folder / "rslora")}
        save_mixture(tmp_path, config, classifier, experts)
        monkeypatch.chdir(tmp_path)
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).base_model
        assert same_tensors(theirs.internal_xlora_classifier.state_dict(), classifier)
        q = theirs.lora_model.model.model.layers[0].self_attn.q_proj
        for i, expert in enumerate(experts):
            weights = expert.weights["model.layers.0.self_attn.q_proj"]
            assert torch.equal(q.lora_A[str(i)].weight, weights.A)
            assert torch.equal(q.lora_B[str(i)].weight, weights.B)

    def test_experts_elsewhere_by_path(self, folder, tmp_path):
        before = load_mixture(folder)
        after = load_mixture(as_peft(folder, tmp_path))
        assert all(same_expert(one, two) for one, two in zip(before.experts, after.experts, strict=True))

    def test_experts_inside_by_another_relative_path(self, folder):
        (folder / "experts").mkdir()
        (folder / "math").rename(folder / "experts" / "one")
        edit_config(folder, adapters={"math": "experts/one", "code": "x/y"})
        mixture = load_mixture(folder)
        assert mixture.experts[0].source == f"{folder}/experts/one"
        assert mixture.config.adapters == {"math": "experts/one", "code": "x/y"}


class TestAnotherRouter:
    """Another kind of router: its tensors have a prefix of their own, and PEFT refuses the file."""

    @pytest.fixture
    def mixture(self):
        return make_mixture(router="static")

    def test_a_round_trip(self, tmp_path, mixture):
        save_mixture(tmp_path, *mixture)
        assert list(load_file(tmp_path / WEIGHTS)) == ["base_model.internal_xlora_router.logits"]
        assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "LORAMIX"
        assert detect(tmp_path) == "mixture"
        again = load_mixture(tmp_path)
        assert again.config == mixture[0]
        assert same_tensors(again.router, mixture[1])
        assert describe(tmp_path).router.to_dict() == {
            "kind": "static",
            "parameters": 2,
            "top_k": None,
            "layerwise": False,
        }

    def test_it_replaces_a_mixture_with_the_classifier(self, tmp_path, mixture):
        save_mixture(tmp_path, *make_mixture())
        save_mixture(tmp_path, *mixture)
        assert load_mixture(tmp_path).config.router == "static"

    def test_tensors_of_a_classifier_are_refused(self, tmp_path, mixture):
        save_mixture(tmp_path, *mixture)
        edit_tensors(tmp_path, lambda t: {f"{KEY}layers.0.bias": torch.ones(2)})
        with pytest.raises(CorruptCheckpointError, match=r"classifier\.layers\.0\.bias', with router='static'"):
            load_mixture(tmp_path)

    def test_a_missing_tensor_is_not_peft_s_fault(self, tmp_path, mixture):
        save_mixture(tmp_path, *mixture)
        edit_tensors(tmp_path, lambda t: {})
        with pytest.raises(IncompleteCheckpointError, match=r"without logits\n") as caught:
            load_mixture(tmp_path)
        assert "PEFT" not in str(caught.value)


def test_a_router_that_is_not_registered_is_named(tmp_path):
    save_mixture(tmp_path, *make_mixture(router="static"))
    edit_config(tmp_path, router="magnetic")
    with pytest.raises(ConfigurationError, match="router='magnetic'"):
        load_mixture(tmp_path)


class TestFromTheHub:
    @pytest.fixture
    def hub(self, folder, tmp_path, monkeypatch):
        def refuse(*_args, **_kwargs):
            raise AssertionError("a request left the machine")

        monkeypatch.setattr("socket.socket.connect", refuse)
        repo = tmp_path / "cache" / "models--user--mixture"
        shutil.copytree(folder, repo / "snapshots" / ("c" * 40))
        (repo / "refs").mkdir()
        (repo / "refs" / "v2").write_text("c" * 40)
        return HubOptions(revision="v2", cache_dir=tmp_path / "cache", local_files_only=True)

    def test_the_experts_come_from_the_same_revision(self, folder, hub):
        mixture = load_mixture("user/mixture", hub)
        expected = load_mixture(folder)
        assert all(same_expert(one, two) for one, two in zip(mixture.experts, expected.experts, strict=True))
        assert [expert.source for expert in mixture.experts] == ["user/mixture/math", "user/mixture/code"]

    def test_each_file_is_asked_for_once(self, hub, monkeypatch):
        asked = []
        real = huggingface_hub.hf_hub_download
        monkeypatch.setattr(
            huggingface_hub,
            "hf_hub_download",
            lambda repo, name, **options: (asked.append((options["subfolder"], name)), real(repo, name, **options))[1],
        )
        load_mixture("user/mixture", hub)
        assert sorted(asked, key=str) == [
            (folder, name) for folder in ("code", "math", None) for name in (CONFIG, WEIGHTS)
        ]

    def test_experts_that_are_nowhere_are_named(self, hub, tmp_path):
        shutil.rmtree(tmp_path / "cache" / "models--user--mixture" / "snapshots" / ("c" * 40) / "code")
        with pytest.raises(CheckpointNotFoundError) as caught:
            load_mixture("user/mixture", hub)
        assert "'code'" in caught.value.received
        assert "'user/code'" in caught.value.received
        assert "adapters=" in caught.value.remedy

    def test_replacing_experts_by_local_ones(self, hub, others):
        mixture = load_mixture("user/mixture", hub, adapters=others)
        assert [expert.name for expert in mixture.experts] == ["new1", "new2"]


class TestReplacingExperts:
    def ranks(self, mixture):
        return {expert.name: expert.rank("model.layers.0.q") for expert in mixture.experts}

    def test_the_same_names_replace_by_name(self, folder, others):
        mixture = load_mixture(folder, adapters={"code": others["new2"], "math": others["new1"]})
        assert list(self.ranks(mixture)) == ["math", "code"]
        assert mixture.config.adapters == {"math": str(others["new1"]), "code": str(others["new2"])}
        assert self.ranks(mixture) == {"math": 4, "code": 4}

    def test_some_of_the_names_replace_only_those(self, folder, others):
        mixture = load_mixture(folder, adapters={"code": others["new1"]})
        assert self.ranks(mixture) == {"math": 2, "code": 4}
        assert mixture.config.adapters == {"math": "user/math", "code": str(others["new1"])}

    def test_new_names_replace_in_order(self, folder, others):
        mixture = load_mixture(folder, adapters={"new2": others["new2"], "new1": others["new1"]})
        assert [expert.name for expert in mixture.experts] == list(mixture.config.adapters) == ["new2", "new1"]

    def test_the_checkpoint_s_own_experts_need_not_be_there(self, folder, others):
        shutil.rmtree(folder / "math")
        shutil.rmtree(folder / "code")
        assert len(load_mixture(folder, adapters=others).experts) == 2

    @pytest.mark.parametrize(
        "names", [[], ["new1"], ["math", "new1"], ["new1", "new2", "new3"], ["math", "code", "new1"]]
    )
    def test_a_wrong_count_or_old_and_new_names_are_an_error(self, folder, names):
        with pytest.raises(ConfigurationError) as caught:
            load_mixture(folder, adapters=dict.fromkeys(names, "x"))
        assert all(repr(name) in caught.value.received for name in [*names, "math", "code"])
        assert "exactly 2 new ones" in caught.value.remedy

    def test_new_names_must_be_folders(self, folder):
        with pytest.raises(AdapterNameError, match=r"'\.\./x'"):
            load_mixture(folder, adapters={"../x": "a", "y": "b"})

    def test_a_replacement_that_is_missing_is_named(self, folder):
        with pytest.raises(CheckpointNotFoundError, match=r"'math'.*/no/such"):
            load_mixture(folder, adapters={"math": "/no/such"})
