"""A forward, and a decode step on a static cache, trace into one graph each and compute what they do eagerly.

In a process of its own: pytest's checker of shapes, which users do not have, cannot be traced.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from support.tiny import build, qwen3_moe, save_expert

pytestmark = pytest.mark.slow

CODE = """
import copy
import sys

import torch
from torch.testing import assert_close
from transformers import StaticCache

from loramix import XLoraConfig, get_peft_model
from support.tiny import HIDDEN, llama, tokens


layerwise, *folders = sys.argv[1:]
adapters = {str(number): folder for number, folder in enumerate(folders)}
config = XLoraConfig(hidden_size=HIDDEN, adapters=adapters, layerwise_scalings=layerwise == "True", top_k_lora=2)
model = get_peft_model(llama(), config).eval()
compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
with torch.no_grad():
    assert_close(compiled(tokens(), use_cache=False).logits, model(tokens(), use_cache=False).logits)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(tokens(), past_key_values=cache, use_cache=True)
    other = copy.deepcopy(cache)
    for seed in range(2):
        token = tokens(2, 1, seed=seed)
        expected = model(token, past_key_values=other, use_cache=True).logits
        assert_close(compiled(token, past_key_values=cache, use_cache=True).logits, expected)
    assert cache.get_seq_length() == cache.base.get_seq_length() == 11
"""


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_forward_and_a_decode_step_are_one_graph(layerwise: bool, experts: Callable[[str], dict[str, str]]) -> None:
    command = [sys.executable, "-c", CODE, str(layerwise), *experts("llama").values()]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SEVERAL = """
import sys
from pathlib import Path

import torch
from torch.testing import assert_close

from loramix import PeftModel, XLoraConfig, get_peft_model
from support.tiny import HIDDEN, llama, tokens


place, *folders = sys.argv[1:]
for name, chosen in (("a", folders), ("b", folders[1:])):
    adapters = {str(number): folder for number, folder in enumerate(chosen)}
    config = XLoraConfig(hidden_size=HIDDEN, adapters=adapters, layerwise_scalings=name == "b")
    get_peft_model(llama(), config).save_pretrained(Path(place) / name)
model = PeftModel.from_pretrained(llama(), Path(place) / "a", "a")
model.load_mixture(Path(place) / "b", "b")
compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
with torch.no_grad():
    for name in "abab":
        with model.use_mixture(name):
            found = compiled(tokens(), use_cache=False).logits
        alone = PeftModel.from_pretrained(llama(), Path(place) / name)
        assert_close(found, alone(tokens(), use_cache=False).logits)
"""


def test_each_of_several_mixtures_is_one_graph(experts: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    command = [sys.executable, "-c", SEVERAL, str(tmp_path), *experts("llama").values()]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BLOCKS = """
import sys

import torch
from torch.testing import assert_close

from loramix import XLoraConfig, get_peft_model
from support.tiny import HIDDEN, qwen3_moe, tokens

config = XLoraConfig(hidden_size=HIDDEN, adapters={"a": sys.argv[1]})
model = get_peft_model(qwen3_moe(), config).eval()
compiled = torch.compile(model, dynamic=False, backend="eager")
with torch.no_grad():
    expected = model(tokens()).logits
    assert_close(compiled(tokens()).logits, expected)
    with model.disable_adapter():
        assert (model(tokens()).logits - expected).abs().max() > 1e-3
"""


@pytest.mark.parametrize("parameters", [["gate.weight"], ["experts.gate_up_proj", "experts.down_proj"]])
def test_mixture_of_experts_blocks_break_the_graph_and_change_no_number(parameters: list[str], tmp_path: Path) -> None:
    folder = save_expert(tmp_path, qwen3_moe(), target_modules=[], target_parameters=parameters)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKS, folder], cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


ENCODER_DECODER = """
import sys

import torch
import transformers
from torch.testing import assert_close

from loramix import XLoraConfig, get_peft_model
from support.tiny import build, tokens

sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
base = build(transformers.T5ForConditionalGeneration, **sizes)
adapters = dict(zip("ab", sys.argv[1:]))
model = get_peft_model(base, XLoraConfig(hidden_size=64, adapters=adapters, scaling_pass_value=0.3)).eval()
inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 5, seed=2), "use_cache": False}
with torch.no_grad():
    assert_close(torch.compile(model, backend="eager")(**inputs).logits, model(**inputs).logits)
"""


def test_an_encoder_and_a_decoder_compile(tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    settings = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
    base = build(transformers.T5ForConditionalGeneration, **sizes)
    folders = [save_expert(tmp_path / one, base, seed=seed, **settings) for seed, one in enumerate("ab")]
    command = [sys.executable, "-c", ENCODER_DECODER, *folders]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
