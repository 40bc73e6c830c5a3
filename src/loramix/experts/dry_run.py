"""Which tokens each layer of a base model sees: its forward, run on a copy whose weights take no memory.

Scalings belong to tokens. Whether a layer sees those of the backbone, in their order, cannot be told from the sizes of
one call: a sequence-first block looks the same where there are as many texts as tokens, cross-attention where both
texts are of one length, a table of positions where the batch is that long. So the sizes are chosen here: no two are
equal.

B, S: batch, sequence. H: hidden size.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loramix.errors import ModelError
from loramix.experts.base_layers import kind_of, linear_sizes
from loramix.experts.base_model import encoder_and_decoder, text_config
from loramix.experts.blocks import form_of
from loramix.experts.kept_state import IDS, TEXT_INPUTS, KeptState, Watch, kept_state, longer, run_copy
from loramix.experts.layer_use import OTHERS, TEXTS, TOKENS, LayerUse, differences, judge, padded_count
from loramix.experts.weight_products import WeightProducts
from loramix.files.base_models import errors_only


class DryRun(dict[str, LayerUse]):
    """What each layer that experts could adapt sees in a forward, by path.

    Attributes:
        kept: what the forward keeps outside the cache.
        hidden_size: the width of the backbone's last hidden state.
    """

    kept: KeptState
    hidden_size: int


def dry_run(model: PreTrainedModel, backbone: str = "") -> DryRun | None:
    """What a forward shows of a model's layers, and of what it keeps.

    The model is not touched: a copy of its structure is run on the CPU, in evaluation mode, on a batch of texts. In
    it a large weight is one number seen many times, and linear layers and blocks of experts give zeros without
    multiplying. Cross-attention gets states of as many tokens as nothing else has.

    Models of one structure are run once.

    Args:
        model: what is run, without a head.
        backbone: the path of its part whose tokens count: the model itself, or the language model in one of several
            parts.

    Returns:
        None where the model could not be run so: it takes inputs that are not known here, or its code needs a device or
        numbers that the copy does not have.
    """
    structure = (_structure(model), backbone)
    if structure not in _known:
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
        with torch.random.fork_rng(devices=[]), errors_only():
            _known[structure] = _dry_run(model, backbone)
    return _known[structure]


def hidden_size_of(model: PreTrainedModel) -> int:
    """H: the width of the last hidden state of the backbone, in an encoder–decoder the decoder.

    Raises:
        ModelError: neither a dry run nor the configuration tells it.
    """
    both = encoder_and_decoder(model)
    base: Any = model.base_model if both is None else both.main
    run = dry_run(base)
    if run is not None:
        return run.hidden_size
    config = text_config(base.config)
    width = getattr(config, "word_embed_proj_dim", None) or _width(config)  # OPT projects its last hidden state
    if width is None:
        raise ModelError(
            "The width of a base model's last hidden state is known.",
            received=f"a {type(model).__name__} without hidden_size in its configuration, which could not be tried",
            remedy="set hidden_size in its configuration, if its forward returns a last_hidden_state; of a model whose "
            "forward returns none, no router can be made",
        )
    return width


_known: dict[object, DryRun | None] = {}
_MOST_KNOWN = 32


def _structure(backbone: PreTrainedModel) -> object:
    """What the dry run depends on: modules, sizes and configuration, but no weight."""
    return (
        tuple((path, type(m)) for path, m in backbone.named_modules(remove_duplicate=False)),
        tuple((name, p.shape, p.dtype) for name, p in backbone.named_parameters(remove_duplicate=False)),
        backbone.config.to_json_string(use_diff=False),  # finding the differences takes longer
        getattr(backbone.config, "_attn_implementation", None),
    )


def _dry_run(model: PreTrainedModel, backbone: str) -> DryRun | None:
    try:
        hollow = _hollow_copy(model)
    except Exception:  # whatever a module's own way of being copied comes up with
        return None
    seen = DryRun({path: LayerUse() for path, module in hollow.named_modules() if kind_of(module) or form_of(module)})
    watch, running = Watch(), _Running(hollow.get_submodule(backbone))
    embedding = _embedding(hollow)
    for path, use in seen.items():
        layer = hollow.get_submodule(path)
        _watch(layer, use, watch, running, names_tokens=layer is embedding)
    for inputs in (inputs for length in _lengths(model.config) for inputs in _attempts(hollow, length)):
        for use in seen.values():
            use.clear()
        try:
            torch.manual_seed(0)  # some models draw the order of their tokens
            out = run_copy(hollow, inputs)
            hidden = _by_token(running.out.last_hidden_state, _width(model.config))
        except Exception:  # the model refuses these inputs in a way of its own: on to the next
            continue
        texts, length, seen.hidden_size = hidden.shape
        mark = _mark(hollow, inputs, hidden, watch, running)
        may_be_padded = any(padded_count(use, texts, length) for use in seen.values())
        if may_be_padded and not _run_longer(hollow, inputs, watch, running, hidden):
            for use in seen.values():
                use.longer.clear()
        seen.kept = KeptState() if backbone else kept_state(hollow, inputs, out, watch)
        judge(seen.values(), texts, length, mark)
        return seen
    return None


def _by_token(hidden: Tensor, width: int | None) -> Tensor:
    """Last hidden states (B, S, H), of a convolutional network's (B, H, height, width) too.

    Raises:
        ValueError: other ones, such as (B, height, width, H).
    """
    if hidden.dim() == 4 and width in (None, hidden.shape[1]):
        return hidden.flatten(2).transpose(1, 2)
    if hidden.dim() != 3:
        raise ValueError(hidden.shape)
    return hidden


def _embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        found: Any = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None  # Perceiver's is a parameter


MARKED = (2, 2)
"""The text and the token that are marked."""


def _mark(model: PreTrainedModel, inputs: Mapping[str, Any], hidden: Tensor, watch: Watch, running: _Running) -> Tensor:
    """Where the last hidden states show a marked token: (B, S), nowhere if they do not."""
    ids = next((inputs[name] for name in IDS if name in inputs), None)
    watch.stage, watch.marked_id = "marked", -1 if ids is None else int(ids[MARKED])
    try:
        torch.manual_seed(0)
        run_copy(model, inputs if ids is not None else {name: _marked(name, x) for name, x in inputs.items()})
        seen = _by_token(running.out.last_hidden_state, hidden.shape[-1])
        return differences(seen, hidden).any(-1)
    except Exception:  # numbers that the model refuses in a way of its own
        return torch.zeros(hidden.shape[:2], dtype=torch.bool)
    finally:
        watch.stage = "none"


def _marked(name: str, value: Any) -> Any:
    """An input with the mark: at the token, or in a column of pixels, or a frame of sound."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    text, token = MARKED
    value = value.clone()
    if name in TEXT_INPUTS:
        value[text, token] += _wave(value.shape[-1])
    else:
        value[text, ..., token] += 1
    return value


def _wave(width: int) -> Tensor:
    return torch.arange(width, dtype=torch.float64).cos()


def _run_longer(
    model: PreTrainedModel, inputs: Mapping[str, Any], watch: Watch, running: _Running, hidden: Tensor
) -> bool:
    """Run texts that are one token longer; whether the last hidden states are so too, which sounds do not make them."""
    watch.stage = "longer"
    try:
        run_copy(model, longer(inputs))
        return _by_token(running.out.last_hidden_state, hidden.shape[-1]).shape[1] == hidden.shape[1] + 1
    except Exception:  # a length that the model refuses in a way of its own
        return False
    finally:
        watch.stage = "none"


class _Running:
    """Whether the backbone of the copy is running, and what it returned last."""

    def __init__(self, backbone: nn.Module) -> None:
        self.now, self.out = False, cast(Any, None)
        forward = type(backbone).forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            outer, self.now = self.now, True
            try:
                self.out = forward(backbone, *args, **kwargs)
            finally:
                self.now = outer
            return self.out

        backbone.__dict__["forward"] = noted


def _lengths(config: Any) -> list[int]:
    """S: as short as possible, but first one of those that BigBird pads and reads by blocks."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return [TOKENS]
    return [(5 + 2 * config.num_random_blocks) * config.block_size + TOKENS, TOKENS]


def _attempts(model: PreTrainedModel, length: int) -> Iterator[dict[str, Any]]:
    """Arguments of a forward, the fullest first: states of another stream are left out where there is none.

    Args:
        model: the copy.
        length: S.
    """
    names = inspect.signature(type(model).forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in names.values())
    quiet = {"use_cache": False, "return_dict": True}
    common = {name: value for name, value in quiet.items() if takes_any or name in names}
    config = text_config(model.config)
    mask = {"attention_mask": torch.ones(TEXTS, length, dtype=torch.long)} if "attention_mask" in names else {}
    text = {"input_ids": _ids(model, length)} if "input_ids" in names else {}
    main: list[dict[str, Any]] = []
    if "decoder_input_ids" in names:
        whole = {"decoder_input_ids": _ids(model, length)}
        main += [whole | features for features in _features(model.config) if features.keys() <= names.keys()]
        main.append(whole | {"input_ids": _ids(model, OTHERS)})
    if text:
        main.append(text)
    if "inputs_embeds" in names:
        main.append({"inputs_embeds": torch.rand(TEXTS, length, _width(config) or 1)})
    if "hidden_states" in names:
        main.append({"hidden_states": torch.rand(TEXTS, length, _width(config) or 1)})
        convolutions = (module for module in model.modules() if isinstance(module, _ConvNd))
        main += [{"hidden_states": torch.rand(TEXTS, each.in_channels, *_MAP)} for each in islice(convolutions, 1)]
    main += [text | features for features in _features(model.config) if features.keys() <= names.keys()]
    if "inputs" in names:
        main += [{"inputs": inputs} for inputs in (_ids(model, length), torch.rand(TEXTS, *_image(model.config)))]
    if "bbox" in names:  # where each token stands on its page
        main += [inputs | {"bbox": torch.zeros(TEXTS, length, 4)} for inputs in main]
    others: list[dict[str, Any]] = [{}]
    for name in ("encoder_hidden_states", "cross_attention_states"):
        if name in names and _attends_to_others(model):
            widths = dict.fromkeys((*_widths(model.config), _width(config) or 1))
            others = [{name: torch.rand(TEXTS, OTHERS, width)} for width in widths] + others
    for inputs in main:
        for other in others:
            yield common | inputs | other
            if mask:
                yield common | inputs | mask | other


def _attends_to_others(model: PreTrainedModel) -> bool:
    """Whether a model that takes an encoder's states was made to: BERT's relatives take them as encoders too."""
    config: Any = model.config
    flags = ("is_encoder_decoder", "is_decoder", "add_cross_attention")
    return any(getattr(config, flag, False) for flag in flags) or any(
        _CROSS_ATTENTION.search(path) for path, _ in model.named_modules()
    )


_CROSS_ATTENTION = re.compile(r"cross|encoder_(?:attn|decoder)|encdec", re.IGNORECASE)


def _ids(model: PreTrainedModel, length: int) -> Tensor:
    return torch.arange(TEXTS * length).view(TEXTS, length) % _entries(model)


_FRAMES, _SAMPLES, _MAP = 80, 16000, (16, 24)


def _features(config: Any) -> Iterator[dict[str, Any]]:
    """Images, or sound: as long as Whisper's encoder takes it, some frames, or a second of samples."""
    channels, height, width = _image(config)
    yield {"pixel_values": torch.rand(TEXTS, channels, height, width)}
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int):  # images of any size, cut into patches
        shape, patches = torch.tensor([[2, 4]] * TEXTS), torch.rand(TEXTS, 8, channels * patch**2)
        yield {"pixel_values": patches, "pixel_attention_mask": torch.ones(TEXTS, 8), "spatial_shapes": shape}
    bands, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bands and positions:
        yield {"input_features": torch.rand(TEXTS, bands, 2 * positions)}
    speech2text = getattr(config, "input_feat_per_channel", 0) * getattr(config, "input_channels", 1)
    for width in (bands, getattr(config, "feature_projection_input_dim", None), speech2text):
        if width:
            yield {"input_features": torch.rand(TEXTS, _FRAMES, width)}
    yield {"input_values": torch.rand(TEXTS, _SAMPLES)}


def _entries(model: PreTrainedModel) -> int:
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = getattr(text_config(model.config), "vocab_size", None)
    return max(1, min(vocabulary or 2**30, max(sizes, default=1)))


def _width(config: Any) -> int | None:
    widths = (getattr(config, name, None) for name in ("hidden_size", "d_model", "n_embd"))
    return next((width for width in widths if isinstance(width, int)), None)


def _widths(config: Any) -> list[int]:
    """Of an encoder's states, where a configuration says them."""
    names = ("encoder_hidden_size", "cross_attention_hidden_size", "vision_output_dim")
    return [width for name in names if isinstance(width := getattr(config, name, None), int)]


def _image(config: Any) -> tuple[int, int, int]:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 224
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return getattr(config, "num_channels", None) or 3, height, width


_SMALL = 2**16
_PLAIN = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _hollow_copy(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy of the structure: buffers are real, large parameters take no memory, quantised layers are plain ones."""
    known: dict[int, Any] = {}
    for module in backbone.modules():
        hook = module.__dict__.get("_hf_hook")  # of accelerate, which may hold the weights of the whole model
        known[id(hook)] = hook
        if kind_of(module) == "linear" and not _is_plain(module, backbone):
            inputs, outputs = linear_sizes(module)
            with torch.device("meta"):
                stub = nn.Linear(inputs, outputs, bias=getattr(module, "bias", None) is not None)
            for name, parameter in stub.named_parameters():
                setattr(stub, name, nn.Parameter(_hollow(parameter), requires_grad=False))
            known[id(module)] = stub
    for parameter in backbone.parameters():
        known[id(parameter)] = nn.Parameter(_hollow(parameter), requires_grad=False)
    for buffer in backbone.buffers():
        known[id(buffer)] = (
            _hollow(buffer) if buffer.is_meta or buffer.numel() > 2**22 else buffer.detach().cpu().clone()
        )
    made = copy.deepcopy(backbone, known)
    for module in made.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, hooks).clear()
        module.__dict__.pop("_hf_hook", None)
        module.__dict__.pop("_old_forward", None)
        module.__dict__.pop("forward", None)
        if _holds_experts(module):
            module.__dict__["forward"] = _zeros_like
        config: Any = getattr(module, "config", None)
        if "flash" in str(getattr(config, "_attn_implementation", "")):
            config._attn_implementation = "sdpa"
    return made.eval()


def _is_plain(module: nn.Module, backbone: nn.Module) -> bool:
    """Whether a layer can be copied: of torch or transformers, or of the same package as the backbone."""
    own = type(backbone).__module__.rpartition(".")[0]
    return type(module) in _PLAIN or type(module).__module__.startswith(("transformers.models.", own))


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a mixture-of-experts block, in tensors of one matrix for each."""
    own = () if isinstance(module, _ConvNd) else module.parameters(recurse=False)
    return any(p.dim() == 3 and len(p) > 1 and p.numel() > _SMALL for p in own)


def _zeros_like(hidden: Tensor, *_: object, **__: object) -> Tensor:
    return torch.zeros_like(hidden)


def _hollow(tensor: Tensor) -> Tensor:
    """One number, seen as often as the tensor is large; small ones are real, so that they can be written to."""
    dtype = torch.float32 if tensor.dtype.is_floating_point else tensor.dtype
    one = torch.full((), 0.02 if dtype.is_floating_point else 0, dtype=dtype).expand(tensor.shape)
    return one.clone() if tensor.numel() <= _SMALL else one


def _watch(layer: nn.Module, use: LayerUse, watch: Watch, running: _Running, *, names_tokens: bool) -> None:
    """Let a layer of the copy note what it sees, and whether its weight is read.

    Args:
        layer: the layer.
        use: where it notes that.
        watch: what is asked.
        running: the backbone's runs.
        names_tokens: whether it is the embedding that is given the texts, which gives a marked token another vector.
    """
    kind = type(layer)
    forward = _zeros_of(layer) if kind.forward in (nn.Linear.forward, Conv1D.forward) else layer.forward

    def note(x: Any, out: Any) -> Any:
        sizes = _tokens(layer, x, out)
        if watch.stage == "whole":
            use.tokens.append(sizes)
            use.prints.append(_print(layer, x, out, sizes))
            use.outside |= not running.now
            use.returns_tuple |= not isinstance(out, Tensor)
        elif watch.stage == "marked":
            is_mark = x == watch.marked_id if names_tokens else None
            use.marked.append(_print(layer, x if is_mark is None else x.masked_fill(is_mark, -1), out, sizes))
            return out if is_mark is None else out + (is_mark[..., None] * _wave(out.shape[-1])).to(out.dtype)
        elif watch.stage != "none":
            (use.continued if watch.stage == "continued" else use.longer).append(sizes)
        return out

    def watched(*args: Any, **kwargs: Any) -> Any:
        if kind_of(layer) == "gate":
            with WeightProducts(cast(Tensor, layer.weight), note):
                return forward(*args, **kwargs)
        out: Any = note(args[0] if args else next(iter(kwargs.values())), forward(*args, **kwargs))
        return out * float("nan") if watch.poisoned and isinstance(layer, nn.Embedding) else out

    def read(self: nn.Module, name: str) -> Any:
        use.weight_read |= name == "weight" and watch.stage == "whole"
        return kind.__getattr__(self, name)

    layer.__class__ = type(kind.__name__, (kind,), {"__getattr__": read})
    layer.__dict__["forward"] = watched


def _zeros_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    width = linear_sizes(layer)[1]
    return lambda x: x.new_zeros(*x.shape[:-1], width) + 0 * x.sum(-1, keepdim=True)  # NaN stays NaN


def _print(layer: nn.Module, x: Any, out: Any, sizes: tuple[int, ...]) -> Tensor:
    """A number for each token that a layer sees, which tells two inputs apart."""
    if not isinstance(x, Tensor):
        return torch.empty(0)
    if isinstance(layer, nn.Embedding):
        return x.double()
    values = _first(out).flatten(2).transpose(1, 2) if isinstance(layer, _ConvNd) else x[: sizes[0]]
    return values.double() @ _wave(values.shape[-1])


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def _tokens(layer: nn.Module, x: Any, out: Any) -> tuple[int, ...]:
    """The sizes of what a layer's scalings must be made for; a convolution's tokens are the positions of its output."""
    if not isinstance(x, Tensor):  # sinusoidal positions are asked for by the sizes of the text
        return ()
    if isinstance(layer, nn.Embedding):
        return tuple(x.shape)
    if isinstance(layer, _ConvNd):
        return (len(x), _first(out).shape[2:].numel())
    form = form_of(layer)
    if form is not None and form.dense:  # all tokens for each of its experts
        return (len(x) // len(getattr(layer, form.up)),)
    return tuple(x.shape[:-1])
