"""What a mixture on a base model is checked for: equal to a slow reference, and the same in every mode.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import PreTrainedModel

from benchmarks.bases.configurations import INPUTS, VOCABULARY, tiny_model
from loramix import LoraConfig, LoramixError, PeftModel, XLoraConfig, get_peft_model
from loramix._compat import enable_checkpointing
from loramix.experts.adapter import Adapter, LoraWeights
from loramix.experts.base_layers import expected_shapes, kind_of, why_unadaptable
from loramix.experts.base_model import Backbones, encoder_and_decoder
from loramix.experts.layer_use import TokenOrder
from loramix.experts.targets import carrier_path, in_head
from loramix.formats import save_adapter
from loramix.layers.inject import Site
from loramix.layers.tokens import outside, refusal, uses_of
from loramix.passes.state import state_of

WORKS, BASE_FAILS, ABSENT, REFUSED, WRONG, FAILS = "works", "base fails", "", "refused", "WRONG", "fails"
NO_MODEL, LAYERS = "no tiny model", "layers"
EXPERTS, RANK, SCALE = 2, 4, 2.0
NEW_TOKENS, TARGET = 6, 5
CLOSE = {"atol": 2e-4, "rtol": 2e-3}


@dataclass
class Case:
    """A base model, its experts, and inputs of a forward.

    Attributes:
        name: its class.
        inputs: of two texts, two images, or two sounds.
        paths: the layers that are adapted.
        candidates: how many layers of the backbone experts could adapt, were it not for the tokens that they see.
        folders: the experts, by name.
    """

    name: str
    inputs: dict[str, Tensor]
    paths: list[str]
    candidates: int
    folders: dict[str, str]

    @property
    def source(self) -> dict[str, Tensor]:
        """What `generate` is given."""
        return {name: value for name, value in self.inputs.items() if name != "decoder_input_ids"}

    def base(self) -> PreTrainedModel:
        """A new base model."""
        return tiny_model(self.name)

    def lone(self) -> Any:
        """A new base model with the first expert alone: one pass, whose weights are as large as a mixture's."""
        model: Any = PeftModel.from_pretrained(self.base(), self.folders["e0"])
        return model.eval()

    def mixture(self, **config: Any) -> Any:
        """A new mixture whose routing is far from uniform."""
        base = self.base()
        torch.manual_seed(3)
        settings = XLoraConfig(adapters=self.folders, layerwise_scalings=True, xlora_dropout_p=0.0, **config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = get_peft_model(base, settings).eval()
        with torch.no_grad():
            for parameter in model.router.parameters():
                parameter.copy_(0.4 * torch.randn_like(parameter))
        return model


def make_case(name: str, folder: Path) -> Case:
    """A base model with two experts on all layers that can have some.

    Raises:
        LoramixError: there is none.
    """
    base = tiny_model(name)
    modules = dict(base.named_modules())
    layers = [path for path, module in modules.items() if kind_of(module) in ("linear", "embedding", "convolution")]
    candidates = [p for p in layers if not why_unadaptable(modules[p], p) and not in_head(modules, p)]
    backbones = encoder_and_decoder(base) or Backbones(_backbone(base, modules, candidates))
    sites = [Site(path, modules[path], ()) for path in candidates]
    around = outside(base, backbones, sites)
    sites = [site for site in sites if site not in around]
    uses, both = uses_of(base, backbones, sites), backbones.encoder is not None
    paths = [s.path for s in sites if uses is None or refusal(uses[s.path], routed=True, has_encoder=both) is None]
    torch.manual_seed(1)
    folders: dict[str, str] = {}
    for number in range(EXPERTS):
        weights = {path: _random_expert(modules[path]) for path in paths}
        config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=paths)
        save_adapter(folder / str(number), Adapter(f"e{number}", config, weights))
        folders[f"e{number}"] = str(folder / str(number))
    return Case(name, _inputs(base), paths, len(sites), folders)


def _backbone(base: PreTrainedModel, modules: dict[str, nn.Module], candidates: list[str]) -> PreTrainedModel:
    path = Counter(carrier_path(modules, path) for path in candidates).most_common(1)[0][0]
    if _reads(base, "input_ids"):
        embedding = _input_embedding(base)
        path = next((carrier_path(modules, p) for p, m in modules.items() if m is embedding), path)
    found = modules[path]
    assert isinstance(found, PreTrainedModel)
    return found


def _input_embedding(base: PreTrainedModel) -> nn.Module | None:
    try:
        return base.get_input_embeddings()
    except NotImplementedError:  # CANINE's characters have several
        return None


def _random_expert(layer: nn.Module) -> LoraWeights:
    A, B = (torch.randn(shape) for shape in expected_shapes(layer, RANK))
    return LoraWeights(A / A[0].numel() ** 0.5, 0.3 * B, embedding=isinstance(layer, nn.Embedding))


def _reads(base: PreTrainedModel, name: str) -> bool:
    return name in inspect.signature(type(base).forward).parameters


def _inputs(base: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(4, VOCABULARY - 8, (2, length), generator=generator) for length in (9, TARGET))
    text, given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, INPUTS.get(base.config.model_type, {})
    if _reads(base, "input_ids"):
        inputs = text | given
    elif given:
        inputs = dict(given)
    elif _reads(base, "input_features"):
        inputs = {"input_features": torch.randn(2, *_sound(base.config), generator=generator)}
    else:
        inputs = {"pixel_values": torch.randn(2, 3, *_image(base.config), generator=generator)}
    if not _reads(base, "decoder_input_ids") or "decoder_input_ids" in inputs:
        return inputs
    try:
        output(base, **inputs, decoder_input_ids=target)
    except Exception:  # BART classifies by the end of the text, which its decoder reads too
        ids[:, -1] = base.config.get_text_config().eos_token_id
        return inputs
    return inputs | {"decoder_input_ids": target}


def _image(config: Any) -> tuple[int, int]:
    """As high and wide as the configuration says."""
    size = getattr(config, "image_size", 16)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _sound(config: Any) -> tuple[int, int]:
    """As many frames as Whisper takes, or a few of another model's."""
    if hasattr(config, "num_mel_bins"):
        return config.num_mel_bins, 2 * config.max_source_positions
    return 40, config.input_feat_per_channel


@torch.no_grad()
def output(model: Any, **inputs: Tensor) -> Tensor:
    """What a forward gives, without gradients."""
    return _given(model(**inputs))


def _given(out: Any) -> Tensor:
    """The logits, or the last hidden state."""
    found = getattr(out, "logits", None)
    return out.last_hidden_state if found is None else found


def forward_equals_reference(case: Case) -> None:
    """A plain forward of the base model, with one expert at a time added to each layer by a hook.

    An encoder's tokens and a decoder's are told apart by their number; where they are equal, as the dry run tells, and
    so is the order of a layer's tokens.
    """
    mixture = case.mixture()
    uses = state_of(mixture).uses
    mixture.enable_scalings_logging()
    found = output(mixture, **case.inputs)
    scalings = mixture.get_scalings_log()  # (B, S, L, E), of an encoder and of a decoder
    base = case.base()
    tensors = {e: _read(folder) for e, folder in enumerate(case.folders.values())}
    for number, path in enumerate(mixture.adapted_modules):
        layer = base.get_submodule(path)

        def add(module: nn.Module, args: Any, y: Tensor, number: int = number, path: str = path) -> Tensor:
            for e, weights in tensors.items():
                delta, tokens = _delta(module, args[0], weights[path].A, weights[path].B)
                order = uses.orders.get(number, TokenOrder())
                fitting = [each for each in scalings if order.padded or each.shape[:2].numel() == math.prod(tokens)]
                own = fitting[0 if number in uses.seeing_encoder else -1][:, :, number, e]
                y = y + SCALE * order.fit(own.unsqueeze(-1), torch.Size(tokens[:-1])).reshape(tokens) * delta
            return y

        layer.register_forward_hook(add)
    assert_close(found, output(base, **case.inputs), **CLOSE)


def _read(folder: str) -> dict[str, LoraWeights]:
    from loramix.formats import load_adapter

    return load_adapter("e", folder).weights


def _delta(layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What one expert adds at scaling 1, and the shape in which the scalings of its tokens fit it."""
    if isinstance(layer, nn.Embedding):
        delta = nn.functional.embedding(x, A.T, layer.padding_idx) @ B.T * getattr(layer, "embed_scale", 1.0)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        convolve: Any = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[A.dim() - 3]
        delta = convolve(convolve(x, A, None, layer.stride, layer.padding), B)
        return delta, (len(delta), 1, *delta.shape[2:])
    else:
        delta = x @ A.T @ B.T
    return delta, (*delta.shape[:-1], 1)


def every_layer_acts(case: Case) -> None:
    """Each adapted layer that the base model calls returns something else than its base layer; not where it gets 0."""
    model, called, acting = case.mixture(), set[str](), set[str]()
    base = case.base()
    for path in case.paths:
        base.get_submodule(path).register_forward_hook(lambda *_, path=path: called.add(path))

        def compare(layer: Any, args: Any, y: Tensor, path: str = path) -> None:
            if not args[0].any() or not torch.equal(layer.base_layer(*args), y):
                acting.add(path)

        model.get_submodule(path).register_forward_hook(compare)
    output(base, **case.inputs)
    output(model, **case.inputs)
    idle = sorted(called - acting)
    assert not idle, f"no expert acts in {', '.join(idle[:3])}"


def _loss(model: Any, case: Case) -> Tensor:
    found = _given(model(**case.inputs))
    return (found.float() * torch.linspace(0.5, 1.5, found.shape[-1])).square().mean()


def cached_equals_uncached(case: Case, model: Any) -> None:
    """Greedy generation: the logits of each step are those of one forward over all tokens."""
    found = generated(model, case.source, return_dict_in_generate=True, output_logits=True)
    ids = found.sequences[:, :-1]
    inputs = case.source | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in case.inputs:
        inputs = case.source | {"decoder_input_ids": ids}
    whole = output(model, **inputs, **_no_cache(model))
    assert_close(torch.stack(found.logits, 1).float(), whole[:, -NEW_TOKENS:].float(), **CLOSE)


def _no_cache(model: Any) -> dict[str, Any]:
    names = inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if "use_cache" in names else {}


def beams(case: Case, model: Any) -> None:
    """Beam search, cached and not; with several numbers of beams, as some never change places."""
    for number in (2, 3, 5):
        settings = {"num_beams": number, "return_dict_in_generate": True, "output_scores": True}
        cached, whole = (generated(model, case.source, use_cache=use, **settings) for use in (True, False))
        assert_close(cached.sequences_scores, whole.sequences_scores, **CLOSE)
        assert torch.equal(cached.sequences, whole.sequences)


def left_padding(case: Case, model: Any) -> None:
    """A short text, of an encoder–decoder the encoder's, in a padded batch and alone."""
    ids, mask = case.inputs["input_ids"].clone(), torch.ones_like(case.inputs["input_ids"])
    mask[1, :3] = 0
    ids[1, :3] = 0
    settings = {"return_dict_in_generate": True, "output_logits": True}
    whole, second = case.source, {name: value[1:] for name, value in case.source.items()}
    padded = generated(model, whole | {"input_ids": ids, "attention_mask": mask}, **settings)
    alone = generated(model, second | {"input_ids": ids[1:, 3:], "attention_mask": mask[1:, 3:]}, **settings)
    assert_close(torch.stack(padded.logits, 1)[1], torch.stack(alone.logits, 1)[0], **CLOSE)


def generated(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    """What `generate` gives, with as many tokens for every row."""
    lengths = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    if model.config.is_encoder_decoder:
        settings["decoder_start_token_id"] = 1
    with torch.no_grad():
        return model.generate(**inputs, **lengths, eos_token_id=None, pad_token_id=0, **settings)


def checkpointed_gradients(case: Case, model: Any) -> None:
    """Those of a training step, with and without recomputation."""
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model = copy.deepcopy(model)
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.zero_grad(set_to_none=True)
        _loss(model, case).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0], "nothing trains"
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))
        assert_close(found[1][name], gradient, atol=atol, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def training_step(case: Case) -> None:
    """The router gets gradients and moves."""
    model = case.mixture().train()
    before = [parameter.clone() for parameter in model.router.parameters()]
    optimizer = torch.optim.SGD(model.router.parameters(), lr=1.0)
    _loss(model, case).backward()
    optimizer.step()
    moved = [
        not torch.equal(a, b) and bool(b.isfinite().all())
        for a, b in zip(before, model.router.parameters(), strict=True)
    ]
    assert all(moved)


def saved_and_loaded(case: Case, folder: Path) -> None:
    """A folder gives the same tensors again, and the same numbers but for how memory is laid out."""
    model = case.mixture()
    model.save_pretrained(folder)
    loaded: Any = PeftModel.from_pretrained(case.base(), str(folder))
    tensors, again = model.state_dict(), loaded.state_dict()
    assert tensors.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert_close(output(loaded, **case.inputs), output(model, **case.inputs), atol=1e-6, rtol=1e-5)


def compiled(case: Case, model: Any) -> None:
    """torch.compile gives the same numbers."""
    expected = output(model, **case.inputs)
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert_close(output(model, **case.inputs), expected, **CLOSE)


CHECKS = {
    "build": "a mixture can be built",
    LAYERS: "how many of the backbone's layers are adapted; the others do not see its tokens, and are refused by name",
    "reference": "a forward equals that of the plain base model with one expert at a time added to each layer",
    "acts": "every adapted layer that the base model calls gives something else than its base layer",
    "cached": "greedy generation with a cache gives the logits of one forward over all tokens",
    "left padding": "a short text in a padded batch gives the logits that it gives alone",
    "beams": "beam search with a cache gives the tokens of recomputing everything",
    "checkpointing": "gradients with and without recomputation are equal",
    "training": "a training step moves the router",
    "saved": "a saved mixture gives the same numbers again",
    "compiled": "a compiled forward gives the same numbers",
}
COMPILED = {"LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM", "MixtralForCausalLM"}


def check(name: str, folder: Path, *, compiling: bool = False) -> dict[str, str]:
    """A cell for each check: works, that the base model fails too, refused with the reason, or WRONG with what.

    Args:
        name: the base model's class.
        folder: for files.
        compiling: whether a few classes are compiled too, which takes longer than all other checks.
    """
    try:
        base = tiny_model(name)
    except Exception as error:
        return {"build": f"{NO_MODEL}: {_reason(error)}"}
    try:
        output(base, **_inputs(base))
    except Exception as error:
        return {"build": f"{NO_MODEL}: the plain base model cannot be run: {_reason(error)}"}
    try:
        case = make_case(name, folder / "experts")
        if not case.paths:
            return {"build": f"{REFUSED}: no layer sees the tokens of its backbone"}
        case.mixture()
    except LoramixError as error:
        return {"build": f"{REFUSED}: {error.received}"}
    except Exception as error:
        return {"build": f"{FAILS}: {_reason(error)}"}
    generates = case.base().can_generate() and not case.inputs.keys().isdisjoint(("input_ids", "decoder_input_ids"))
    cells = dict.fromkeys(CHECKS, ABSENT) | {"build": WORKS, LAYERS: f"{len(case.paths)} of {case.candidates}"}
    cells["reference"] = _cell(lambda: forward_equals_reference(case))
    cells["acts"] = _cell(lambda: every_layer_acts(case))
    if generates:
        cells["cached"] = _beside(case, cached_equals_uncached)
        if "input_ids" in case.inputs:
            cells["left padding"] = _beside(case, left_padding)
        cells["beams"] = BASE_FAILS if cells["cached"] == BASE_FAILS else _beside(case, beams)
    trainable = case.mixture(use_trainable_adapters=True)
    cells["checkpointing"] = _unless(
        lambda: checkpointed_gradients(case, trainable), lambda: checkpointed_gradients(case, case.base())
    )
    cells["training"] = _unless(lambda: training_step(case), lambda: _loss(case.base().train(), case).backward())
    cells["saved"] = _cell(lambda: saved_and_loaded(case, folder / "saved"))
    if compiling and name in COMPILED:
        cells["compiled"] = _cell(lambda: compiled(case, case.mixture()))
    return cells


def _beside(case: Case, run: Callable[[Case, Any], None]) -> str:
    """A cell of a check of generation; its plain models are the base model, and that with one expert."""
    return _unless(lambda: run(case, case.mixture()), lambda: run(case, case.base()), lambda: run(case, case.lone()))


def _unless(run: Callable[[], None], *plain: Callable[[], None]) -> str:
    """A cell; what a plain model fails too is the base model's own failure."""
    found = _cell(run)
    return BASE_FAILS if status(found) in (WRONG, FAILS) and any(_cell(one) != WORKS for one in plain) else found


def status(cell: str) -> str:
    """A cell without its reason."""
    return cell.partition(":")[0]


def _cell(run: Callable[[], None]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except LoramixError as error:
        return f"{REFUSED}: {error.rule}"
    except AssertionError as error:
        return f"{WRONG}: {' '.join(str(error).split())[:200]}"
    except Exception as error:
        return f"{FAILS}: {_reason(error)}"
    return WORKS


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"{text.partition(' but ')[0]}, which is not installed" if " but " in text else text
    return f"{type(error).__name__}: {text[:200]}"
