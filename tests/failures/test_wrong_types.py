"""Values of a wrong type: an error of ours, that says what it wants, and nothing changed.

The other tests run with every annotation checked, which would stop such a call first; these run as a user's process
does, without that.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[1]
SCRIPT = """
import json, os, sys, warnings
import numpy, torch
import loramix
from loramix import LoraConfig, PeftConfig, PeftModel, XLoraConfig, get_peft_model
from loramix.model.prompt_choice import Responses, Similarity
from support.tiny import llama

warnings.simplefilter("ignore")
expert, other, folder = sys.argv[1:]
os.chdir(folder)
model = get_peft_model(llama(), XLoraConfig(hidden_size=64, adapters={"math": expert, "code": other}))
model.save_pretrained("mixture")
base, ids = llama(), torch.tensor([[1, 2]])
CASES = {
    "no configuration": lambda: get_peft_model(base, None),
    "a path for a configuration": lambda: get_peft_model(base, "mixture"),
    "a dictionary for a configuration": lambda: get_peft_model(base, {"peft_type": "XLORA"}),
    "a bare PeftConfig": lambda: get_peft_model(base, PeftConfig()),
    "a base model in DataParallel": lambda: get_peft_model(torch.nn.DataParallel(llama()), LoraConfig()),
    "a compiled base model": lambda: get_peft_model(torch.compile(llama()), LoraConfig()),
    "no base model": lambda: get_peft_model(None, LoraConfig()),
    "no identifier": lambda: PeftModel.from_pretrained(base, None),
    "a number for an identifier": lambda: PeftModel.from_pretrained(base, 3),
    "a number for a subfolder": lambda: PeftModel.from_pretrained(base, "mixture", subfolder=3),
    "a list of experts": lambda: PeftModel.from_pretrained(base, "mixture", adapters=[expert]),
    "a list beside one expert": lambda: PeftModel.from_pretrained(base, expert, adapters=[expert]),
    "a text for experts": lambda: PeftModel.from_pretrained(base, "mixture", adapters="abc"),
    "an expert without a path": lambda: PeftModel.from_pretrained(base, "mixture", adapters={"math": None}),
    "a save to None": lambda: model.save_pretrained(None),
    "a save to nothing": lambda: model.save_pretrained(""),
    "a save to a number": lambda: model.save_pretrained(3),
    "a save to a null byte": lambda: model.save_pretrained("a" + chr(0)),
    "a text for scalings": lambda: model.fixed_scalings("abc"),
    "no scalings": lambda: model.fixed_scalings(None),
    "a text for a choice by the prompt": lambda: model.fix_routing(prompt={"input_ids": ids}, by="responses"),
    "another signal": lambda: Responses(signal="variance"),
    "a part for the number of experts": lambda: Responses(top_k=0.5),
    "a text for a temperature": lambda: Similarity(torch.eye(2), temperature="low"),
    "a temperature beyond float32": lambda: XLoraConfig(hidden_size=64, adapters={}, softmax_temperature=10**400),
    "a depth beyond any": lambda: XLoraConfig(hidden_size=64, adapters={}, xlora_depth=10**30),
}
before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
told = {}
for name, call in CASES.items():
    files = sorted(os.listdir("."))
    try:
        call()
        told[name] = "no error"
    except loramix.LoramixError as error:
        told[name] = f"{type(error).__name__}: {error}"
    except Exception as error:
        told[name] = f"raw {type(error).__name__}: {error}"
    if sorted(os.listdir(".")) != files or not all(map(torch.equal, before.values(), base.state_dict().values())):
        told[name] = "changed something"
model.set_topk_lora(torch.tensor(2))
model.set_global_scaling_weight(numpy.float32(0.5))
model.save_pretrained("again")
told["numbers"] = [XLoraConfig.from_pretrained("again").top_k_lora, model.get_global_scaling_weight()]
print(json.dumps(told))
"""
EXPECTED = {
    "no configuration": "ModelError: A model is built from one loramix.XLoraConfig",
    "a path for a configuration": "ModelError: A model is built from one loramix.XLoraConfig",
    "a dictionary for a configuration": "ModelError: A model is built from one loramix.XLoraConfig",
    "a bare PeftConfig": "ModelError: A model is built from one loramix.XLoraConfig",
    "a base model in DataParallel": "ModelError: The base model is a transformers PreTrainedModel",
    "a compiled base model": "ModelError: The base model is a transformers PreTrainedModel",
    "no base model": "ModelError: The base model is a transformers PreTrainedModel",
    "no identifier": "CheckpointNotFoundError: An identifier is a folder or a Hub id",
    "a number for an identifier": "CheckpointNotFoundError: An identifier is a folder or a Hub id",
    "a number for a subfolder": "ConfigurationError: subfolder is text, or None",
    "a list of experts": "ConfigurationError: adapters must map names",
    "a list beside one expert": "ConfigurationError: adapters= replaces the experts of a mixture",
    "a text for experts": "ConfigurationError: adapters must map names",
    "an expert without a path": "ConfigurationError: adapters must map each name",
    "a save to None": "SaveError: The folder to save into must be named",
    "a save to nothing": "SaveError: The folder to save into must be named",
    "a save to a number": "SaveError: The folder to save into must be named",
    "a save to a null byte": "SaveError: The folder to save into must be named",
    "a text for scalings": "RoutingError: Fixed scalings hold one finite number",
    "no scalings": "RoutingError: Fixed scalings hold one finite number",
    "a text for a choice by the prompt": "ConfigurationError: by chooses weights by a prompt",
    "another signal": "ConfigurationError: An expert's signal is the norm of its answer",
    "a part for the number of experts": "ConfigurationError: top_k must be a whole number",
    "a text for a temperature": "ConfigurationError: temperature must be a finite number",
    "a temperature beyond float32": "ConfigurationError: softmax_temperature must be a finite number",
    "a depth beyond any": "ConfigurationError: xlora_depth must be a whole number",
}


@pytest.fixture(scope="module")
def told(experts: Callable[[str], dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case says, in a process of its own."""
    folders = list(experts("llama").values())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *folders[:2], str(tmp_path_factory.mktemp("wrong"))],
        env={"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_case_is_expected_to_say_something(told: dict[str, str]) -> None:
    assert set(told) == {*EXPECTED, "numbers"}


@pytest.mark.parametrize("case", EXPECTED)
def test_it_says_what_it_wants(case: str, told: dict[str, str]) -> None:
    assert told[case].startswith(EXPECTED[case]), told[case]
    assert "\n  received: " in told[case]
    assert "\n  remedy: " in told[case]


def test_setters_take_numbers_of_any_make(told: dict[str, Any]) -> None:
    assert told["numbers"] == [2, 0.5]
