"""Experts and mixtures: some that the real PEFT saved from tiny random models, some of ours."""

from __future__ import annotations

import warnings

import pytest

from loramix.formats import save_adapter, save_mixture
from support.checkpoints import HIDDEN, PEFT_EXPERTS, make_expert, make_mixture, tiny_gpt2, tiny_llama


@pytest.fixture(scope="session")
def peft_folder(tmp_path_factory):
    """Folders that PEFT wrote: one for each of PEFT_EXPERTS, "prefix" (another method) and "xlora" (incomplete)."""
    folder = tmp_path_factory.mktemp("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        for name, settings in PEFT_EXPERTS.items():
            base = tiny_gpt2() if name == "gpt2" else tiny_llama()
            config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
            peft.get_peft_model(base, config).save_pretrained(folder / name)
        prefix = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        peft.get_peft_model(tiny_llama(), prefix).save_pretrained(folder / "prefix")
        experts = {"0": str(folder / "plain"), "1": str(folder / "rslora")}
        xlora = peft.XLoraConfig(hidden_size=HIDDEN, adapters=experts, xlora_depth=2, xlora_size=8)
        peft.get_peft_model(tiny_llama(), xlora).save_pretrained(folder / "xlora")
    return folder


@pytest.fixture
def folder(tmp_path):
    """A good mixture of two experts, to be changed."""
    save_mixture(tmp_path / "mixture", *make_mixture(xlora_depth=2, xlora_size=8))
    return tmp_path / "mixture"


@pytest.fixture
def others(tmp_path):
    """Two more experts, saved elsewhere."""
    for seed, name in ((50, "new1"), (60, "new2")):
        save_adapter(tmp_path / name, make_expert(name, seed=seed, r=4))
    return {name: tmp_path / name for name in ("new1", "new2")}
