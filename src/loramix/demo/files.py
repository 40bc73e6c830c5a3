"""The demo's base model, experts and text as files, for `loramix train`."""

from __future__ import annotations

import json
import shutil
from os import PathLike
from pathlib import Path

from loramix.demo import bundle, corpus
from loramix.errors import SaveError

CHARACTERS = {"train": 60_000, "test": 6_000}
PROMPTS = {
    "code": ["def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n"],
    "prose": ["The method returns a list of the names in the current scope. If no argument is given, it is empty.\n"],
    "math": ["Question: Ada has 57 books and gets 68 more. How many books does Ada have now?\n57 + 68 = 125\n"],
    "tables": ['{"code": "03B1", "name": "GREEK SMALL LETTER ALPHA", "category": "Ll", "direction": "L"}\n'],
}
RUN = """\
base: base
dtype: float32                       # it is stored in bfloat16; on a CPU float32 is faster
experts:
  code: experts/code
  prose: experts/prose
  math: experts/math
  tables: experts/tables
data: {train: train, eval: test}     # folders of text, one subfolder an expert
output: run
mixture: {xlora_depth: 2, xlora_size: 32, xlora_dropout_p: 0.0, layerwise_scalings: true}
objectives: {supervised: 0.1}
init: {method: prompts, prompts: prompts.json}
cache: 500MB
trainer:
  max_steps: 60
  per_device_train_batch_size: 8
  max_length: 256
  learning_rate: 0.005
  lr_scheduler_type: cosine
  logging_steps: 10
  save_steps: 30
"""


def write_files(folder: str | PathLike[str]) -> list[str]:
    """Write the base model, the experts, text, prompts and the settings of a run; their names are returned.

    Args:
        folder: a new or empty folder; all paths in `run.yaml` are relative to it.

    Raises:
        SaveError: the folder is not empty, or cannot be written.
    """
    root = Path(folder)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise FileExistsError("it is not empty")
        shutil.copytree(bundle.DATA / "base", root / "base")
        for name, expert in bundle.experts().items():
            shutil.copytree(expert, root / "experts" / name)
        for part, texts in (("train", corpus.train_text), ("test", corpus.heldout_text)):
            for domain in corpus.DOMAINS:
                for number, text in enumerate(texts(domain, CHARACTERS[part])):
                    file = root / part / domain / f"{number:03}.txt"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text(text, encoding="utf-8")
        (root / "prompts.json").write_text(json.dumps(PROMPTS, indent=1) + "\n", encoding="utf-8")
        (root / "run.yaml").write_text(RUN, encoding="utf-8")
    except OSError as error:
        raise SaveError(
            "The demo's files go into a new folder.",
            received=f"{str(root)!r}: {error}",
            remedy="Name another folder.",
        ) from error
    return ["base", "experts", "train", "test", "prompts.json", "run.yaml"]
