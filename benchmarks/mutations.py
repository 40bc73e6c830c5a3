"""`python -m benchmarks.mutations`: valid folders with one thing changed load to equal numbers, or are refused by name.

    python -m benchmarks.mutations --cases 10000 --json docs/mutations.json

A case is a folder of one of `FOLDERS`, one change of one of its files, and a load into a tiny base model. Accepted are
logits equal to those of the folder as it was, and the package's own exceptions; not other exceptions, other numbers,
`SLOW` seconds, or memory beyond `LARGE`. Changes keep to what has no other valid meaning: a key that is dropped has the
value of its default, a tensor is never replaced by another one that would do.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import resource
import shutil
import struct
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from safetensors.torch import load, save
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from loramix import LoraConfig, LoramixError, PeftModel, XLoraConfig, get_peft_model
from loramix.formats import save_mixture

SLOW, LARGE = 20.0, 512 * 2**20
"""Seconds for a case, and bytes that all cases of a run may add to the memory in use."""
IDS = torch.tensor([[1, 5, 9, 2, 7]])
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def base() -> Any:
    """A new tiny base model, always with the same weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    """Those of what is in a folder, on the base model."""
    model: Any = PeftModel.from_pretrained(base(), folder)
    return model(IDS).logits


def _expert(folder: Path, seed: int = 1, **config: Any) -> Path:
    torch.manual_seed(seed)
    settings = {"r": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, **config}
    model: Any = get_peft_model(base(), LoraConfig(**settings))
    model.save_pretrained(folder)
    return folder


def mixture(folder: Path, **config: Any) -> Any:
    """A new mixture of two experts, which are written into a folder."""
    experts = {name: str(_expert(folder / "experts" / name, n)) for n, name in enumerate("01")}
    torch.manual_seed(2)
    model: Any = get_peft_model(base(), XLoraConfig(hidden_size=16, adapters=experts, **config))
    return model


def _saved(folder: Path, **config: Any) -> Path:
    mixture(folder, **config).save_pretrained(folder / "saved")
    return folder / "saved"


def _in_format(format: str) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        from loramix.formats import load_mixture

        saved = load_mixture(_saved(folder))
        save_mixture(folder / format, saved.config, saved.router, saved.experts, format=format)
        return folder / format

    return made


def _sharded(folder: Path) -> Path:
    path = _expert(folder)
    weights = path / "adapter_model.safetensors"
    tensors = load(weights.read_bytes())
    names = sorted(tensors)
    weights.unlink()
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"adapter_model-0000{number}-of-00002.safetensors"
        (path / shard).write_bytes(save({name: tensors[name] for name in part}))
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    return path


def _pickled(folder: Path) -> Path:
    path = _expert(folder)
    weights = path / "adapter_model.safetensors"
    torch.save(load(weights.read_bytes()), path / "adapter_model.bin")
    weights.unlink()
    return path


FOLDERS: dict[str, Callable[[Path], Path]] = {
    "expert": _expert,
    "expert with DoRA": lambda folder: _expert(folder, use_dora=True),
    "expert in shards": _sharded,
    "pickled expert": _pickled,
    "mixture": _saved,
    "mixture, layerwise": lambda folder: _saved(folder, layerwise_scalings=True),
    "mixture, static": lambda folder: _saved(folder, router="static"),
    "original library's": _in_format("original"),
    "PEFT's": _in_format("peft"),
}
"""A valid folder of each kind."""


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a pickle was run')",))


STRANGE: list[Any] = [
    *([], {}, "", "x", -1, 0, 0.5, 1e308, 10**400, True, False, [[]], {"a": {"b": 1}}, ["x"] * 3, "../../x", "/"),
    *([None] * 3, [1, None], float("nan"), float("inf"), "\0", "é" * 50, {"": ""}, "1", [0.1]),
]
CONTENTS = [b"", b"\0" * 64, b"{", b"null", b"[]", b'"x"', b"\xff\xfe\0\0", b"{}", b"[" * 10000, b"PK\x03\x04"]


@dataclass(frozen=True)
class Change:
    """One change of a file.

    Attributes:
        what: it is, in words.
        path: of the file, in the folder.
    """

    what: str
    path: str


def change(folder: Path, rng: random.Random) -> Change:
    """Change one file of a folder, and say how."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"))
    kinds: list[Callable[[Path, random.Random], str]] = [_replace_content, _cut, _remove]
    if path.suffix == ".json":
        kinds += [_change_json] * 7
    elif path.suffix == ".safetensors":
        kinds += [_change_tensors] * 4 + [_change_header] * 3
    else:
        kinds += [_change_pickle] * 4
    return Change(rng.choice(kinds)(path, rng), str(path.relative_to(folder)))


def _replace_content(path: Path, rng: random.Random) -> str:
    content = rng.choice(CONTENTS)
    path.write_bytes(content)
    return f"content {content[:8]!r}"


def _cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    kept = rng.randrange(len(content))
    path.write_bytes(content[:kept])
    return f"{kept} of {len(content)} bytes"


def _remove(path: Path, rng: random.Random) -> str:
    path.unlink()
    if rng.random() < 0.3:
        path.mkdir()
        return "a folder in its place"
    return "removed"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of nested JSON, as its holder and its key."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    for key, inner in entries:
        yield value, key
        yield from _places(inner)


def _may_replace(value: Any, before: Any) -> bool:
    """Whether a value has a meaning where another one stood: both are switches, or both numbers."""
    if isinstance(before, bool):
        return isinstance(value, bool)
    return all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300 for x in (value, before))


def _change_json(path: Path, rng: random.Random) -> str:
    value = json.loads(path.read_text(encoding="utf-8"))
    holder, key = rng.choice(list(_places(value)))
    how = rng.choice(["strange", "strange", "strange", "drop", "rename", "extra", "BOM", "twice"])
    if how == "strange":
        before = holder[key]
        holder[key] = rng.choice([value for value in STRANGE if not _may_replace(value, before)])
        how = f"{key!r}: {str(holder[key])[:20]!r} for {str(before)[:20]!r}"
    elif how == "drop":
        del holder[key]
        how = f"without {key!r}"
    elif how == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
        how = f"{key!r} renamed"
    elif how == "extra" and isinstance(holder, dict):
        holder["another"] = rng.choice(STRANGE)
    text = json.dumps(value)
    if how == "twice":
        text += text
    path.write_text(text, encoding="utf-8-sig" if how == "BOM" else "utf-8")
    return f"JSON, {how}"


def _changed(tensors: dict[str, Tensor], rng: random.Random) -> str:
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    how = rng.choice(["drop", "rename", "transpose", "cut", "flat", "integers", "booleans", "NaN", "empty", "scalar"])
    if how == "rename":
        tensors[f"{name}_"] = tensors.pop(name)
    elif how == "drop":
        del tensors[name]
    else:
        # What would fit again, such as the transpose of a square matrix, is cut instead.
        makes: dict[str, Callable[[], Tensor]] = {
            "transpose": lambda: (
                tensor.T.contiguous() if tensor.dim() == 2 and len(set(tensor.shape)) > 1 else tensor[1:]
            ),
            "cut": lambda: tensor[:-1].clone(),
            "flat": lambda: tensor.flatten() if tensor.dim() > 1 else tensor[:, None].expand(-1, 2).clone(),
            "integers": lambda: (100 * tensor).to(torch.int32),
            "booleans": lambda: tensor > 0,
            "NaN": lambda: tensor * math.nan,
            "empty": lambda: tensor[:0].clone(),
            "scalar": lambda: tensor.sum(),
        }
        tensors[name] = makes[how]()
    return f"{name}: {how}"


def _change_tensors(path: Path, rng: random.Random) -> str:
    tensors = load(path.read_bytes())
    if rng.random() < 0.1:
        tensors["another.weight"] = torch.zeros(2, 2)
        what = "another tensor"
    else:
        what = _changed(tensors, rng)
    path.write_bytes(save(tensors))
    return what


def _change_header(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    how = rng.choice(["length", "offsets", "shape", "dtype", "strange", "text"])
    if how == "length":
        claimed = rng.choice([0, 1, length - 1, length + 1, 2**20, 2**40, 2**63, 2**64 - 1])
        path.write_bytes(struct.pack("<Q", claimed) + content[8:])
        return f"header of {claimed} bytes"
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    if how == "offsets":
        entry["data_offsets"] = rng.choice([[0, 4], [-4, 0], [10**15, 10**15 + 4], [8, 4], [0, len(data)], "x", [0]])
    elif how == "shape":
        entry["shape"] = rng.choice([[], [0], [2**62, 4], [-1, 2], "x", [1.5], [[1]]])
    elif how == "dtype":
        entry["dtype"] = rng.choice(["F64", "I8", "X", "", 1, "BF16", "F8_E4M3"])
    elif how == "strange":
        header[name] = rng.choice(STRANGE)
    text = json.dumps(header).encode()
    if how == "text":
        at = rng.randrange(len(text))
        text = text[:at] + bytes([rng.randrange(128)]) + text[at + 1 :]
        if _means_the_same(text, header):
            text = b"{"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"header, {how} of {name}"


def _means_the_same(text: bytes, header: dict[str, Any]) -> bool:
    """Whether a changed header still names the same tensors, in other places: digits of offsets, letters of names."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return found.keys() != header.keys() or any(
        isinstance(found[name], dict) and found[name].get("data_offsets") != header[name].get("data_offsets")
        for name in header
        if isinstance(header[name], dict)
    )


def _change_pickle(path: Path, rng: random.Random) -> str:
    how = rng.choice(["code", "code by torch", "tensors", "list", "bytes"])
    if how == "code":
        path.write_bytes(pickle.dumps(_Code()))
    elif how == "code by torch":
        torch.save({"x": _Code()}, path)
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "bytes":
        content = bytearray(path.read_bytes())
        for _ in range(8):
            content[rng.randrange(min(200, len(content)))] = rng.randrange(256)
        path.write_bytes(bytes(content))
    else:
        tensors: dict[str, Tensor] = torch.load(path, weights_only=True)
        how = _changed(tensors, rng)
        torch.save(tensors, path)
    return f"pickle, {how}"


def outcome(folder: Path, expected: Tensor) -> str:
    """What loading a changed folder comes to: "equal", the name of an error of the package, or a fault."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = logits(folder)
        said = "equal" if torch.equal(found, expected) else "FAULT: other numbers"
    except LoramixError as error:
        said = type(error).__name__
        if not (error.rule and error.received and error.remedy):
            said = f"FAULT: {said} without rule, received or remedy"
    except BaseException as error:  # SystemExit of a pickle too
        if isinstance(error, KeyboardInterrupt):
            raise
        said = f"FAULT: {type(error).__name__}: {error}"
    return said if time.monotonic() - start < SLOW else f"FAULT: {time.monotonic() - start:.0f} s"


@dataclass(frozen=True)
class Case:
    """One case: a kind of folder, what was changed, and what loading it came to."""

    kind: str
    change: Change
    outcome: str


def run(kind: str, cases: int, seed: int, place: Path) -> Iterator[Case]:
    """The cases of one kind of folder, drawn with a seed."""
    whole = FOLDERS[kind](place / "valid")
    expected = logits(whole)
    rng = random.Random(f"{kind} {seed}")
    for number in range(cases):
        folder = place / str(number)
        shutil.copytree(whole, folder)
        changed = change(folder, rng)
        yield Case(kind, changed, outcome(folder, expected))
        shutil.rmtree(folder)


def memory() -> int:
    """The most bytes that this process has used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(
    cases: Annotated[int, typer.Option(help="How many, of all kinds together.")] = 10_000,
    seed: Annotated[int, typer.Option(help="What draws them.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the counts are written.")] = None,
) -> None:
    """Change valid folders, load them, and count what comes of it."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    counts: dict[str, Counter[str]] = {}
    faults: list[Case] = []
    before = 0
    for kind in FOLDERS:
        counts[kind] = Counter()
        with tempfile.TemporaryDirectory() as place:
            for case in run(kind, cases // len(FOLDERS), seed, Path(place)):
                before = before or memory()
                counts[kind][case.outcome.partition(":")[0]] += 1
                if case.outcome.startswith("FAULT"):
                    faults.append(case)
                    print(case, flush=True)
        print(kind, dict(counts[kind]), flush=True)
    added = memory() - before
    if json_file is not None:
        found = {"seed": seed, "transformers": transformers.__version__, "counts": counts, "faults": len(faults)}
        json_file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if faults or added > LARGE:
        raise SystemExit(f"{len(faults)} faults, {added / 2**20:.0f} MiB more than after the first case")


if __name__ == "__main__":
    typer.run(main)
