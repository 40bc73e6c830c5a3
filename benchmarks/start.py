"""Importing in a fresh process, and loading a mixture onto a base model that is there."""

from __future__ import annotations

import copy
import resource
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.models import Models
from loramix import PeftModel
from loramix.timing import Contender, Measurement, interleave

IMPORTS = {
    "base": "import transformers; from transformers import LlamaForCausalLM",
    "loramix": "import transformers; from transformers import LlamaForCausalLM; from loramix import get_peft_model",
    "PEFT": "import transformers; from transformers import LlamaForCausalLM; from peft import get_peft_model",
}


def measure(models: Models, rounds: int) -> list[Measurement]:
    """Import time; load time of the whole checkpoint, against a copy of the base model's tensors."""
    imports = [Contender(name, lambda code=code: _run(code)) for name, code in IMPORTS.items()]
    samples = interleave(imports, rounds, warm_ups=0, clock=_child_seconds)
    found = [Measurement("import in a fresh process", samples, 1.0, 1.05)]
    with tempfile.TemporaryDirectory() as folder:
        models.loramix.save_pretrained(folder)
        loaded: list[Any] = []

        def load() -> None:
            loaded.append(PeftModel.from_pretrained(models.base, folder))
            loaded.pop().unload()

        contenders = [Contender("base", lambda: copy.deepcopy(models.base)), Contender("loramix", load)]
        times = interleave(contenders, rounds)
    facts = {"base": "a copy of the base model's tensors"}
    return [*found, Measurement("load a mixture onto its base model (base: copy its tensors)", times, facts=facts)]


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
