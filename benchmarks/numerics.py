"""Proof that a change leaves the numerics as they were: freeze before it, compare after it, on the same machine.

    python -m benchmarks.numerics freeze before.safetensors
    python -m benchmarks.numerics compare before.safetensors

Frozen of each model of `numerics_cases.py`: logits, loss and scalings, with and without a cache; losses, gradients of
training with dropout, and the weights after three steps; the same under gradient checkpointing; the tokens of each
decoding strategy, greedy and sampled, and what they cost (calls of the last block, and tokens in them); fixed routing
and merged weights; settings changed while it runs; the disabled adapter; the tensors in the adapter files. The saved
folders are kept in FILE.checkpoints: `compare` loads what the older code wrote, a trainer's `model.safetensors` too.

`compare` prints one line for each model. Numbers are equal if they differ by at most the tolerance (NaN equals NaN, 0.0
equals -0.0), tokens and counts if they are the same. It exits with 1 if anything differs, is missing, or is new.

Parameters go by the name that they have in the model, without the part `stacks.<n>.` that adapted layers may put
before `lora_A`. One thread, so that sums have one order; another CPU or other versions may round otherwise.
"""

from __future__ import annotations

import copy
import itertools
import json
import platform
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from benchmarks.numerics_cases import Case, Inputs, cases, fill_router
from loramix import PeftModel, XLoraModel

STRATEGIES = (False, True, 7, "lookup")
NEW = 16
STEPS = 3
TRAINER_FILE = "model.safetensors"

Tensors = dict[str, Tensor]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
File = Annotated[Path, typer.Argument(help="A safetensors file; its checkpoints lie beside it.")]
Only = Annotated[str, typer.Option(help="Only models whose name contains this.")]


@app.callback()
def prepare() -> None:
    """Freeze what is computed before a change, and compare after it."""
    torch.set_num_threads(1)
    disable_progress_bar()


@app.command()
def freeze(file: File, only: Only = "") -> None:
    """Write what the code computes now."""
    folder = checkpoints_of(file)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors: Tensors = {}
    for case in _chosen(only):
        tensors |= compute(case, folder / case.name, folder / case.name)
        print(f"{case.name}: frozen", flush=True)
    save_file(tensors, file, {"circumstances": json.dumps(circumstances())})


@app.command()
def compare(
    file: File,
    only: Only = "",
    tolerance: Annotated[float, typer.Option(help="Largest absolute difference; 0: bit for bit.")] = 0.0,
    every: Annotated[bool, typer.Option("--all", help="Name every tensor that differs.")] = False,
) -> None:
    """Compare what the code computes now with what was frozen."""
    with safe_open(file, "pt") as frozen_file:
        then = json.loads(frozen_file.metadata()["circumstances"])
    for fact, now in circumstances().items():
        if then.get(fact) != now:
            print(f"note: {fact} was {then.get(fact)}, and is {now}")
    frozen, differing, largest, chosen = load_file(file), 0, 0.0, _chosen(only)
    for case in chosen:
        before = {name: tensor for name, tensor in frozen.items() if name.startswith(f"{case.name}/")}
        found = _differences_of(case, before, checkpoints_of(file) / case.name)
        largest = max([largest, *found.values()])
        wrong = {name: size for name, size in found.items() if not size <= tolerance}
        differing += bool(wrong)
        print(f"{case.name}: {_told(found, wrong, every)}", flush=True)
    groups = {name.partition("/")[0] for name in frozen}
    gone = sorted(name for name in groups - {case.name for case in chosen} if only in name)
    for name in gone:
        print(f"{name}: DIFFERS, there is no such model any more")
    print(f"{len(chosen) - differing} of {len(chosen)} models are the same; the largest difference is {largest:g}")
    if differing or gone:
        raise typer.Exit(1)


def compute(case: Case, written: Path, kept: Path) -> Tensors:
    """All that is frozen of a model.

    Args:
        case: the model.
        written: an empty folder for what it saves.
        kept: the folder that is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = case.build(case.base(), Path(folder))
    is_mixture = isinstance(model, XLoraModel)
    parts = {"initial": parameters(model, "lora_")}
    if case.fills_router:
        fill_router(model)
    model.save_pretrained(written / "initial")
    parts |= {
        "forward": _forward(model, case.batch),
        "disabled": _disabled(model, case.batch),
        "generate": _generate(model, case) if case.base().can_generate() else {},
        "checkpointed": _checkpointed(model, case.batch),
        "merged": _merged(copy.deepcopy(model), case.batch),
    }
    if is_mixture:
        parts["changed"] = _changed(copy.deepcopy(model), case.batch)
        parts["fixed"] = _fixed(copy.deepcopy(model), case, written)
    parts["training"] = _train(model, case.batch)
    model.save_pretrained(written / "trained", state_dict=model.state_dict())  # as a trainer calls it
    parts["files"] = _files(written)
    parts["loaded"] = _loaded(case, kept)
    parts["unloaded"] = {"logits": _logits(model.unload(), case.batch)}
    return {
        f"{case.name}/{part}/{name}": tensor.contiguous().clone()  # safetensors takes none that share memory
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def parameters(model: nn.Module, wanted: str) -> Tensors:
    """Copies of the parameters whose names contain `wanted`, which "lora_" does for router and experts."""
    return {normalised(name): p.detach().clone() for name, p in model.named_parameters() if wanted in name}


def normalised(name: str) -> str:
    """A parameter's name without the number of a stack of experts in its layer."""
    return re.sub(r"\bstacks\.\d+\.", "", name)


@torch.no_grad()
def _logits(model: Any, inputs: Inputs) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def _forward(model: Any, inputs: Inputs) -> Tensors:
    out = model(**inputs, labels=_labels(inputs))
    found = {"logits": out.logits, "loss": out.loss, **_scalings(model)}
    if model.can_generate():
        prompt, text = inputs["input_ids"][1:, :6], inputs["input_ids"][1:]  # the row without padding
        first = model(input_ids=prompt, use_cache=True)
        found["prefill"] = first.logits
        found["cached"] = model(input_ids=text[:, 6:], past_key_values=first.past_key_values, use_cache=True).logits
        found |= {f"cached {name}": tensor for name, tensor in _scalings(model).items()}
    return found


def _scalings(model: Any) -> Tensors:
    return {"scalings": model.get_latest_scalings()} if isinstance(model, XLoraModel) else {}


def _labels(inputs: Inputs) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def _disabled(model: Any, inputs: Inputs) -> Tensors:
    with model.disable_adapter():
        return {"logits": _logits(model, inputs)}


def _generate(model: Any, case: Case) -> Tensors:
    """Tokens by text, strategy and way of choosing, and their cost; a plain LoRA model has no strategies."""
    is_mixture, found = isinstance(model, XLoraModel), {}
    texts = {"batch": case.batch, "row": case.row}
    for text, how, sampled in itertools.product(texts, STRATEGIES if is_mixture else (None,), (False, True)):
        strategy = {"lockstep": how} if is_mixture else {}
        name = f"{text} {how} {'sampled' if sampled else 'greedy'}"
        torch.manual_seed(3)
        with _counted(model) as calls:
            found[name] = model.generate(**texts[text], max_new_tokens=NEW, do_sample=sampled, **strategy)
        found[f"{name} calls"] = torch.tensor([len(calls), sum(calls)])
    if is_mixture:
        found |= _logged(model, case.batch)
    return found


def _logged(model: Any, inputs: Inputs) -> Tensors:
    """The logits and the scalings of each token, in lockstep."""
    model.enable_scalings_logging()
    how: dict[str, Any] = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**inputs, max_new_tokens=NEW, lockstep=True, **how)
    log = torch.cat(model.get_scalings_log(), dim=1)
    model.disable_scalings_logging()
    model.clear_scalings_log()
    return {"logits": torch.stack(out.logits, dim=1), "scalings log": log}


@contextmanager
def _counted(model: nn.Module) -> Generator[list[int]]:
    """Tokens in each call of the model's last block. No hook: decoding goes another way where it sees one."""
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and not name.endswith("stacks")]
    block = lists[0][-1]
    calls: list[int] = []
    call = block.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(hidden.shape[:-1].numel())
        return call(hidden, *args, **kwargs)

    block.forward = forward
    try:
        yield calls
    finally:
        del block.forward


def _checkpointed(model: Any, inputs: Inputs) -> Tensors:
    """A training step under gradient checkpointing."""
    if not model.supports_gradient_checkpointing:
        return {}
    model = copy.deepcopy(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return _train(model, inputs, steps=1)


def _merged(model: Any, inputs: Inputs) -> Tensors:
    if isinstance(model, XLoraModel):
        model.fix_routing(_weights(model))
    return {"logits": _logits(model.merge_and_unload(), inputs)}


def _weights(model: Any) -> Tensor:
    return torch.linspace(1.0, -0.25, len(model.expert_names))


def _changed(model: Any, inputs: Inputs) -> Tensors:
    """With settings changed while it runs."""
    model.set_topk_lora(2)
    model.set_global_scaling_weight(0.5)
    model.set_softmax_temperature(1.5)
    model.set_scaling_pass_value(None)
    return {"logits": _logits(model, inputs), **_scalings(model)}


def _fixed(model: Any, case: Case, written: Path) -> Tensors:
    """One pass with the same scalings for all tokens."""
    shared, generates = _weights(model), model.can_generate()
    by_layer = shared * torch.linspace(0.5, 1.5, len(model.adapted_modules)).unsqueeze(1)
    found: Tensors = {}
    for name, scalings in (("shared", shared), ("by layer", by_layer)):
        with model.fixed_scalings(scalings):
            found[name] = _logits(model, case.batch)
    if generates:
        model.fix_routing(after=4)
        found["after"] = model.generate(**case.batch, max_new_tokens=NEW, do_sample=False, lockstep=False)
        model.unfix_routing()
        model.fix_routing(prompt=case.batch)
        found["from a prompt"] = model.fixed_routing
    model.fix_routing(by_layer)
    if generates:
        found["tokens"] = model.generate(**case.batch, max_new_tokens=NEW, do_sample=False)
    if case.one_adapter:
        model.save_fixed(written / "fixed")
        found["left out"] = torch.tensor(model.save_fixed(written / "fixed rank 3", rank=3))
    return found


def _train(model: Any, inputs: Inputs, steps: int = STEPS) -> Tensors:
    """Steps of AdamW, with dropout: losses, the gradients of the first, and what there is in the end."""
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
    found: Tensors = {}
    torch.manual_seed(5)
    for step in range(steps):
        optimiser.zero_grad()
        loss = model(**inputs, labels=_labels(inputs)).loss
        loss.backward()
        found[f"loss {step}"] = loss.detach()
        if step == 0:
            missing = torch.tensor(float("nan"))
            gradients = {name: missing if p.grad is None else p.grad for name, p in trained.items()}
            found |= {f"gradient {normalised(name)}": value.clone() for name, value in gradients.items()}
            found |= _scalings(model)
        optimiser.step()
    found["random numbers"] = torch.rand(1)  # as many were drawn
    model.eval()
    found |= {f"trained {normalised(name)}": parameter.detach() for name, parameter in trained.items()}
    return {**found, "logits": _logits(model, inputs)}


def _files(folder: Path) -> Tensors:
    """What the adapter files hold."""
    return {
        f"{path.parent.relative_to(folder).as_posix()} {name}": tensor
        for path in sorted(folder.rglob("adapter_model.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _loaded(case: Case, folder: Path) -> Tensors:
    """The logits of each checkpoint, and of a model that takes its trained values from a trainer's file."""
    found: Tensors = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = _logits(PeftModel.from_pretrained(case.base(), path), case.batch)
        if (path / TRAINER_FILE).exists():
            model: Any = PeftModel.from_pretrained(case.base(), path, is_trainable=True).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    nn.init.constant_(parameter, 0.01)
            keys = model.load_state_dict(load_file(path / TRAINER_FILE), strict=False)
            found[f"{path.name} by a trainer"] = _logits(model, case.batch)
            found[f"{path.name} unexpected keys"] = torch.tensor(len(keys.unexpected_keys))
    return found


def differences(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> largest absolute difference; infinite where a tensor is missing, new, or of another kind."""
    names = [*before, *(name for name in now if name not in before)]
    return {name: _difference(before.get(name), now.get(name)) for name in names}


def _difference(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=float("inf")).max().item() if a.numel() else 0.0


def _differences_of(case: Case, before: Tensors, kept: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            now = compute(case, Path(folder), kept)
        except Exception as error:  # the others are still worth a look
            traceback.print_exc(file=sys.stderr)
            return {f"{case.name}/raised {type(error).__name__}: {error}": float("inf")}
    return differences(before, now)


def _told(found: Mapping[str, float], wrong: Mapping[str, float], every: bool) -> str:
    if not any(found.values()):
        return f"identical ({len(found)} tensors)"
    shown = wrong or found
    name = max(shown, key=lambda name: shown[name])
    text = f"{_size(shown[name])} in {name.partition('/')[2]}, and in {sum(map(bool, found.values())) - 1} more"
    lines = (f"\n  {_size(size)}  {name.partition('/')[2]}" for name, size in found.items() if size)
    return ("DIFFERS by " if wrong else "within the tolerance: ") + text + ("".join(lines) if every else "")


def _size(difference: float) -> str:
    """In words where it is no number: other tokens, another shape or dtype, a tensor that is missing or new."""
    return "more than a number" if difference == float("inf") else f"{difference:.3g}"


def circumstances() -> dict[str, str]:
    """What numbers may depend on beside the code."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "safetensors")}
    return {**packages, "python": platform.python_version(), "cpu": torch.backends.cpu.get_cpu_capability()}


def checkpoints_of(file: Path) -> Path:
    """The folder of the saved models."""
    return file.with_name(f"{file.name}.checkpoints")


def _chosen(only: str) -> list[Case]:
    found = [case for case in cases() if only in case.name]
    if not found:
        names: Iterable[str] = (case.name for case in cases())
        raise typer.BadParameter(f"none of {', '.join(names)} contains {only!r}", param_hint="--only")
    return found


if __name__ == "__main__":
    app()
