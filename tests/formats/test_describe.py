"""What a folder is, from its files alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loramix.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedAdapterError
from loramix.files.hub import HubOptions
from loramix.formats import describe, detect, save_adapter, save_mixture
from support.checkpoints import HIDDEN, make_expert, make_mixture


def test_detecting(tmp_path, peft_folder):
    save_mixture(tmp_path, *make_mixture())
    assert detect(tmp_path) == "mixture"
    assert detect(tmp_path / "math") == "expert"
    assert detect(tmp_path, HubOptions(subfolder="code")) == "expert"
    assert (detect(peft_folder / "plain"), detect(peft_folder / "xlora")) == ("expert", "mixture")
    with pytest.raises(UnsupportedAdapterError, match="PREFIX_TUNING"):
        detect(peft_folder / "prefix")
    with pytest.raises(CheckpointNotFoundError):
        detect(tmp_path.parent)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CorruptCheckpointError):
        detect(tmp_path)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_mixture(tmp_path, layerwise):
    config, classifier, experts = make_mixture(xlora_depth=2, xlora_size=8, layerwise_scalings=layerwise, top_k_lora=1)
    config.task_type = "CAUSAL_LM"
    save_mixture(tmp_path, config, classifier, experts)
    found = describe(tmp_path)
    assert (found.kind, found.base_model, found.task_type) == ("mixture", "user/base", "CAUSAL_LM")
    assert (found.num_layers, found.num_experts) == (2, 2)
    out = 4 if layerwise else 2
    assert found.router is not None
    assert found.router.parameters == HIDDEN * 8 + 8 + 8 * out + out
    assert (found.router.layerwise, found.router.top_k) == (layerwise, 1)
    assert found.router.settings == {"depth": 2, "hidden_size": HIDDEN}
    assert [(expert.name, expert.ranks) for expert in found.experts] == [("math", (2,)), ("code", (3,))]


def test_layers_are_those_that_at_least_one_expert_adapts(tmp_path):
    config, classifier, experts = make_mixture()
    experts[1] = make_expert("code", modules=["model.layers.1.q", "model.layers.5.k"])
    save_mixture(tmp_path, config, classifier, experts)
    found = describe(tmp_path)
    assert found.num_layers == 3
    assert found.experts[1].targets == ("k", "q")


def test_an_expert(tmp_path):
    save_adapter(tmp_path / "math", make_expert("x", use_rslora=True, lora_bias=True))
    found = describe(tmp_path / "math")
    (expert,) = found.experts
    assert (found.kind, found.num_layers, found.router, expert.name) == ("expert", 2, None, "math")
    assert (expert.modules, expert.parameters) == (2, 2 * (2 * 2 * HIDDEN + HIDDEN))
    assert (expert.alpha, expert.targets, expert.dtypes) == (4, ("q",), ("float32",))
    assert expert.variants == ("rslora", "bias")


def test_it_is_json(tmp_path):
    save_mixture(tmp_path, *make_mixture())
    document = json.loads(json.dumps(describe(tmp_path).to_dict(), allow_nan=False))
    assert (document["kind"], document["num_experts"], document["num_layers"]) == ("mixture", 2, 2)
    assert document["experts"][0]["ranks"] == [2]
    parameters = 2 * (HIDDEN + 1)
    settings = {"depth": 1, "hidden_size": HIDDEN, "layerwise": False}
    assert document["router"] == {"kind": "classifier", "parameters": parameters, "top_k": None, **settings}


def test_importing_needs_no_models():
    code = "import sys, loramix.formats; print('transformers' in sys.modules, 'huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
