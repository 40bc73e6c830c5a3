"""A format of another package: registered, recognised, read, written; read only, or written only."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from loramix.config.xlora import XLoraConfig
from loramix.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigurationError,
    UnsupportedAdapterError,
    UnsupportedOperationError,
)
from loramix.files.atomic import text_writer
from loramix.files.tensors import read_tensors
from loramix.formats import (
    ExpertFormat,
    MixtureCheckpoint,
    MixtureFormat,
    describe,
    detect,
    format,
    load_adapter,
    load_mixture,
    register_format,
    save_adapter,
    save_mixture,
)
from loramix.formats.load import read_expert
from support.checkpoints import contents, make_expert, make_mixture, same_expert, same_tensors


class Listed(MixtureFormat):
    """A mixture that is only read: a list of experts' folders, and a router in another file."""

    name = "listed"

    def matches(self, location):
        return location.find("experts.json") is not None

    def read(self, location, adapters=None, config=None):
        names = json.loads(location.find("experts.json").read_text())
        config = XLoraConfig(hidden_size=16, adapters={name: name for name in names})
        router = read_tensors(location.find("router.safetensors"))
        return MixtureCheckpoint(config, router, [read_expert(location.below(name), name) for name in names])


class Ordering(MixtureFormat):
    """A file that is only written: the experts in order."""

    name = "ordering"

    def writers(self, content):
        order = {"order": list(content.config.adapters), "layers": content.num_layers}
        return {"ordering.json": text_writer(json.dumps(order))}


class Single(ExpertFormat):
    """An expert that is only read."""

    name = "single"

    def matches(self, location):
        return location.find("single.safetensors") is not None

    def read(self, location, name, config=None):
        expert = make_expert(name, seed=7)
        expert.source = str(location)
        return expert


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    for registry in (format._EXPERTS, format._MIXTURES):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    for kind in (Listed, Ordering, Single):
        register_format(kind())


@pytest.fixture
def listed(tmp_path):
    _, router, experts = make_mixture()
    for expert in experts:
        save_adapter(tmp_path / "listed" / expert.name, expert)
    (tmp_path / "listed" / "experts.json").write_text('["math", "code"]')
    save_file(router, tmp_path / "listed" / "router.safetensors")
    return tmp_path / "listed"


def test_a_mixture_is_recognised_read_and_described(listed):
    _, router, experts = make_mixture()
    assert detect(listed) == "mixture"
    mixture = load_mixture(listed)
    assert same_tensors(mixture.router, router)
    assert all(map(same_expert, mixture.experts, experts))
    description = describe(listed)
    assert (description.num_experts, description.num_layers, description.router.kind) == (2, 2, "classifier")


def test_it_is_saved_in_ours(listed, tmp_path):
    mixture = load_mixture(listed)
    save_mixture(tmp_path / "ours", mixture.config, mixture.router, mixture.experts)
    assert same_tensors(load_mixture(tmp_path / "ours").router, mixture.router)


def test_an_expert_is_recognised_also_inside_a_mixture(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "single.safetensors").touch()
    assert detect(tmp_path / "other") == "expert"
    expert = load_adapter("math", tmp_path / "other")
    assert (expert.name, expert.source) == ("math", str(tmp_path / "other"))
    assert describe(tmp_path / "other").experts[0].name == "other"
    save_mixture(tmp_path / "mixture", *make_mixture())
    replaced = load_mixture(tmp_path / "mixture", adapters={"code": tmp_path / "other"})
    assert same_expert(replaced.experts[1], make_expert("code", seed=7))


def test_what_is_only_written_lies_beside_what_is_there(tmp_path):
    mixture = make_mixture()
    save_mixture(tmp_path, *mixture, trainer_state={"weight": torch.ones(1)})
    before = contents(tmp_path)
    save_mixture(tmp_path, *mixture, format="ordering")
    after = contents(tmp_path)
    assert json.loads(after.pop("ordering.json")) == {"order": ["math", "code"], "layers": 2}
    assert after == before
    assert detect(tmp_path) == "mixture"


def test_alone_it_is_no_checkpoint(tmp_path):
    save_mixture(tmp_path, *make_mixture(), format="ordering")
    with pytest.raises(CheckpointNotFoundError, match="which has none"):
        load_mixture(tmp_path)


def test_a_format_that_claims_to_match_and_reads_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Ordering, "matches", lambda self, location: True)
    with pytest.raises(UnsupportedOperationError, match="'ordering', which is write-only"):
        load_mixture(tmp_path)


def test_what_is_only_read_is_not_written(tmp_path):
    with pytest.raises(UnsupportedOperationError, match="'listed', which is read-only"):
        save_mixture(tmp_path, *make_mixture(), format="listed")
    with pytest.raises(UnsupportedOperationError, match="'single', which is read-only"):
        save_adapter(tmp_path, make_expert("math"), format="single")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", ["lora", "single", "nonsense"])
def test_a_mixture_in_no_format_of_mixtures(tmp_path, name):
    with pytest.raises(ConfigurationError) as caught:
        save_mixture(tmp_path, *make_mixture(), format=name)
    assert "'xlora', " in caught.value.rule
    assert "'listed', 'ordering'" in caught.value.rule
    assert repr(name) in caught.value.received
    assert contents(tmp_path) == {}


def test_an_expert_in_no_format_of_experts(tmp_path):
    with pytest.raises(ConfigurationError, match="'lora', 'single'"):
        save_adapter(tmp_path, make_expert("math"), format="xlora")


def test_pefts_formats_are_asked_first(tmp_path):
    save_mixture(tmp_path, *make_mixture())
    (tmp_path / "experts.json").write_text("not read")
    assert list(load_mixture(tmp_path).config.adapters) == ["math", "code"]


def test_the_other_kind_is_refused_by_the_format_s_name(listed):
    with pytest.raises(CheckpointError, match=r"'math'.*a mixture \(format 'listed'\)"):
        load_adapter("math", listed)


def test_a_name_that_is_taken():
    with pytest.raises(ConfigurationError, match=r"'ordering', which is .*Ordering"):
        register_format(Ordering())


def test_what_none_recognises_is_still_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UnsupportedAdapterError, match="IA3"):
        detect(tmp_path)
