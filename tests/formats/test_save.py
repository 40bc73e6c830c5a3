"""What a save writes, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loramix.errors import AdapterNameError, ConfigurationError, SaveError
from loramix.experts.adapter import Adapter, LoraWeights
from loramix.formats import load_adapter, load_mixture, save_adapter, save_mixture
from support.checkpoints import contents, make_expert, make_mixture, same_expert, same_tensors

WEIGHTS, CONFIG, TRAINER = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_weights_say_that_they_are_pytorch_s(tmp_path):
    save_mixture(tmp_path, *make_mixture())
    assert metadata(tmp_path / WEIGHTS)["format"] == "pt"
    assert metadata(tmp_path / "math" / WEIGHTS)["format"] == "pt"


def test_files_can_be_read_by_whom_the_process_lets(tmp_path):
    save_adapter(tmp_path, make_expert("math"))
    (tmp_path / "other").touch()
    assert {(tmp_path / name).stat().st_mode for name in (WEIGHTS, CONFIG, "other")} == {
        (tmp_path / "other").stat().st_mode
    }


def test_tensors_that_share_memory_are_written_whole(tmp_path):
    stacked = torch.arange(64.0).reshape(4, 16)
    expert = make_expert("math")
    tied = torch.ones(16, 2)
    for i, path in enumerate(expert.weights):
        expert.weights[path] = LoraWeights(stacked[2 * i : 2 * i + 2], tied if i else tied.T.T)
    save_adapter(tmp_path, expert)
    assert same_expert(load_adapter("math", tmp_path), expert)
    assert (tmp_path / WEIGHTS).stat().st_size < 2000


def test_tensors_that_require_gradients_and_are_not_contiguous(tmp_path):
    A, B = torch.randn(16, 2).T.requires_grad_(), torch.nn.Parameter(torch.randn(16, 2))
    expert = Adapter("math", make_expert("math").config, {"q": LoraWeights(A, B)})
    save_adapter(tmp_path, expert)
    assert torch.equal(load_adapter("math", tmp_path).weights["q"].A, A)


def test_saving_where_we_loaded_from(tmp_path):
    config, classifier, experts = make_mixture(seed=1)
    save_mixture(tmp_path, config, classifier, experts)
    loaded = load_mixture(tmp_path)
    swapped = dict(zip(("math", "code"), reversed(loaded.experts), strict=True))
    renamed = [Adapter(name, expert.config, expert.weights) for name, expert in swapped.items()]
    save_mixture(tmp_path, loaded.config, loaded.router, renamed)
    again = load_mixture(tmp_path)
    assert same_tensors(again.router, classifier)
    assert [same_expert(one, two) for one, two in zip(again.experts, reversed(experts), strict=True)] == [True, True]
    assert all(same_expert(one, two) for one, two in zip(loaded.experts, experts, strict=True))


def test_files_of_others_stay_as_they_are(tmp_path):
    save_mixture(tmp_path, *make_mixture(seed=1))
    foreign = {"notes.txt": b"mine", "math/notes.txt": b"mine too", "adapter_model.bin": b"old", "README.md": b"#"}
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    save_mixture(tmp_path, *make_mixture(seed=2))
    after = contents(tmp_path)
    assert {name: after[name] for name in foreign} == foreign


def test_links_are_replaced_and_not_followed(tmp_path):
    save_adapter(tmp_path / "original", make_expert("math", seed=1))
    before = contents(tmp_path / "original")
    (tmp_path / "linked").mkdir()
    for name in (WEIGHTS, CONFIG):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "original" / name)
    save_adapter(tmp_path / "linked", make_expert("math", seed=2))
    assert contents(tmp_path / "original") == before
    assert not (tmp_path / "linked" / WEIGHTS).is_symlink()


class TestExpertsThatWeDidNotWrite:
    @pytest.fixture
    def folder(self, tmp_path):
        """A user's own expert lies where the mixture's would."""
        save_adapter(tmp_path / "math", make_expert("math", seed=9))
        tensors = load_file(tmp_path / "math" / WEIGHTS)
        save_file(tensors, tmp_path / "math" / WEIGHTS, metadata={"format": "pt"})
        return tmp_path

    def test_a_mixture_does_not_overwrite_them(self, folder):
        before = contents(folder)
        with pytest.raises(SaveError) as caught:
            save_mixture(folder, *make_mixture())
        assert contents(folder) == before
        assert str(folder / "math") in caught.value.received
        assert WEIGHTS in caught.value.received
        assert "another folder" in caught.value.remedy

    def test_nor_through_a_link(self, folder):
        (folder / "mixture").mkdir()
        (folder / "mixture" / "math").symlink_to(folder / "math")
        before = contents(folder / "math")
        with pytest.raises(SaveError, match="a link"):
            save_mixture(folder / "mixture", *make_mixture())
        assert contents(folder / "math") == before

    @pytest.mark.parametrize(
        "save", [lambda f: save_adapter(f, make_expert("m")), lambda f: save_mixture(f, *make_mixture())]
    )
    def test_a_folder_that_holds_one_is_refused(self, folder, save):
        before = contents(folder)
        with pytest.raises(SaveError, match="loramix did not write"):
            save(folder / "math")
        assert contents(folder) == before

    def test_experts_of_ours_that_are_no_part_of_a_mixture_stay(self, tmp_path):
        save_adapter(tmp_path / "math", make_expert("math", seed=10))
        before = contents(tmp_path)
        with pytest.raises(SaveError, match="no part of a mixture"):
            save_mixture(tmp_path, *make_mixture())
        assert contents(tmp_path) == before

    def test_an_expert_does_not_become_a_mixture_nor_the_other_way_round(self, tmp_path):
        save_adapter(tmp_path / "expert", make_expert("x"))
        save_mixture(tmp_path / "mixture", *make_mixture())
        before = contents(tmp_path)
        with pytest.raises(SaveError, match="another kind"):
            save_mixture(tmp_path / "expert", *make_mixture())
        with pytest.raises(SaveError, match="another kind"):
            save_adapter(tmp_path / "mixture", make_expert("x"))
        assert contents(tmp_path) == before


class TestTrainerState:
    state = {"internal_xlora_classifier.layers.0.bias": torch.ones(2)}  # noqa: RUF012

    def test_it_is_written_in_the_model_s_keys(self, tmp_path):
        save_mixture(tmp_path, *make_mixture(), trainer_state=self.state)
        assert same_tensors(load_file(tmp_path / TRAINER), self.state)
        save_adapter(tmp_path / "lone", make_expert("x"), trainer_state=self.state)
        assert same_tensors(load_file(tmp_path / "lone" / TRAINER), self.state)

    def test_an_earlier_one_of_ours_is_removed_with_its_weights(self, tmp_path):
        save_mixture(tmp_path / "mixture", *make_mixture(), trainer_state=self.state)
        save_mixture(tmp_path / "mixture", *make_mixture())
        save_adapter(tmp_path / "expert", make_expert("x"), trainer_state=self.state)
        save_adapter(tmp_path / "expert", make_expert("x"))
        assert not list(tmp_path.rglob(TRAINER))

    def test_the_base_models_own_weights_in_the_same_folder_stay(self, tmp_path):
        save_file({"model.weight": torch.ones(3)}, tmp_path / TRAINER, metadata={"format": "pt"})
        before = (tmp_path / TRAINER).read_bytes()
        with pytest.warns(UserWarning, match="left alone"):
            save_mixture(tmp_path, *make_mixture(), trainer_state=self.state)
        assert (tmp_path / TRAINER).read_bytes() == before

    @pytest.mark.parametrize("content", [None, b"", b"no tensors"])
    def test_somebody_else_s_stays(self, tmp_path, content):
        if content is None:
            save_file(self.state, tmp_path / TRAINER, metadata={"format": "pt"})
        else:
            (tmp_path / TRAINER).write_bytes(content)
        before = (tmp_path / TRAINER).read_bytes()
        save_mixture(tmp_path, *make_mixture())
        assert (tmp_path / TRAINER).read_bytes() == before


class TestWhatIsRefused:
    def test_experts_other_than_the_configuration_s(self, tmp_path):
        config, classifier, experts = make_mixture()
        with pytest.raises(AdapterNameError) as caught:
            save_mixture(tmp_path, config, classifier, experts[::-1])
        assert "['code', 'math']" in caught.value.received
        assert contents(tmp_path) == {}

    def test_a_classifier_other_than_the_configuration_s(self, tmp_path):
        config, classifier, experts = make_mixture()
        with pytest.raises(ConfigurationError, match=r"layers\.0\.bias"):
            save_mixture(tmp_path, config, {"layers.0.weight": classifier["layers.0.weight"]}, experts)
        with pytest.raises(ConfigurationError, match=r"layers\.9\.bias"):
            save_mixture(tmp_path, config, classifier | {"layers.9.bias": torch.ones(1)}, experts)
        assert contents(tmp_path) == {}

    @pytest.mark.parametrize("place", ["", "math", CONFIG, f"math/{WEIGHTS}"])
    def test_a_file_or_folder_in_the_way(self, tmp_path, place):
        """A file where a folder belongs, and the other way round."""
        target = tmp_path / "mixture"
        obstacle = target / place
        obstacle.parent.mkdir(parents=True, exist_ok=True)
        obstacle.mkdir() if place.endswith((CONFIG, WEIGHTS)) else obstacle.write_bytes(b"in the way")
        (tmp_path / "notes.txt").write_text("mine")
        before = contents(tmp_path)
        with pytest.raises(SaveError) as caught:
            save_mixture(target, *make_mixture())
        assert contents(tmp_path) == before
        assert str(target) in caught.value.received
        assert caught.value.remedy
