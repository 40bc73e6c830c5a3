"""`python -m benchmarks.bases`: check every class, into docs/bases.json and docs/bases.md; some, if they are named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from transformers.utils import logging

from benchmarks.bases.checks import check
from benchmarks.bases.configurations import MAPPINGS, classes
from benchmarks.bases.table import JSON, PAGE, page


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Classes; all of them if none is named.")] = None,
) -> None:
    """Check what works on each class of base models, one after the other, on one thread."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    known = json.loads(JSON.read_text(encoding="utf-8"))["rows"] if JSON.exists() and names else {}
    rows: dict[str, dict[str, dict[str, str]]] = {mapping: dict(known.get(mapping, {})) for mapping in MAPPINGS}
    for mapping in MAPPINGS:
        for name in classes(mapping).values():
            if names and name not in names:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows[mapping][name] = check(name, Path(folder), compiling=True)
            print(mapping, name, rows[mapping][name], flush=True)
    found = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0], "rows": rows}
    JSON.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
