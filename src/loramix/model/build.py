"""Build a mixture on a Hugging Face model, or load one.

The model stays a `PreTrainedModel` of its own class, and gains the methods of `peft_methods.py` and, for a mixture,
`xlora_methods.py`. `get_peft_model` and `PeftModel.from_pretrained` return the object they were given.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, ABCMeta
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from transformers import PreTrainedModel

from loramix.config.base import PeftConfig, PeftsConfig, as_own
from loramix.config.lora import LoraConfig
from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError, ModelError
from loramix.experts.adapter import Adapter
from loramix.experts.base_layers import device_of, unpack
from loramix.experts.base_model import Backbones, identifier_of
from loramix.experts.base_weights import OwnRows, own_rows
from loramix.experts.dropping import without_unsupported
from loramix.experts.dry_run import hidden_size_of
from loramix.experts.initialise import new_adapter, new_member, settle_new
from loramix.experts.on_base import on_base
from loramix.files.hub import HubOptions
from loramix.files.location import Location
from loramix.formats.load import kind_at, read_expert, read_mixture
from loramix.formats.mixture import MixtureCheckpoint
from loramix.layers.inject import adapt, find_backbones, head_site, plan, put_on, refuse_meta, router_sizes
from loramix.layers.layer import XLoraLayer
from loramix.layers.tokens import BaseUses, check_uses
from loramix.model.checks import (
    check_blocks,
    check_embeddings,
    check_head,
    check_plain,
    check_widths,
    checked_router,
    given_scalings,
)
from loramix.model.own_weights import put_rows
from loramix.model.peft_methods import ADAPTER_NAME, PeftMethods
from loramix.model.replacing import replacing
from loramix.model.several import add, base_copy, refuse_taken
from loramix.model.through_base_model import PartMethods, ThroughBaseModel, let_through
from loramix.model.xlora_methods import XLoraMethods
from loramix.passes.call import Role
from loramix.passes.checkpointing import route_checkpoints
from loramix.passes.specialise import rebind_forward, specialise
from loramix.passes.state import AdaptedState, MixtureState
from loramix.routers.router import HiddenStateRouter, TextRouter

_Config = TypeVar("_Config", bound=PeftConfig)


class LoadingMethods(XLoraMethods):
    """The methods of a mixture, with the one that loads another beside it."""

    def load_mixture(self, model_id: str | PathLike[str], name: str, **how: Any) -> None:
        """Load one more saved mixture onto the base model of this one; `use_mixture` chooses which of them runs.

        All share the base model's weights. Only weights that came with a mixture's experts, such as embeddings or a
        head, are copied for it. Each computes and saves what it would on a base model of its own. If anything here
        fails, the model is left as it was.

        Args:
            model_id: a folder, or a Hub identifier.
            name: what it is called from now on.
            **how: as for `PeftModel.from_pretrained`: is_trainable, adapters, revision, ….

        Raises:
            ConfigurationError: the name is taken; or as `PeftModel.from_pretrained`.
            RoutingError: in a forward, or inside `fixed_scalings(…)` or `disable_adapter()`.
            UnsupportedOperationError: one LoRA expert, or weights of the base model that train or are offloaded.
            CheckpointError, AdapterError, ModelError: as `PeftModel.from_pretrained`.
        """
        self._check_free(f"load_mixture({name!r})")
        model = self.get_base_model()
        refuse_taken(model, name)
        other = PeftModel.from_pretrained(base_copy(model), model_id, name, **how)
        cast(Any, other)._loramix.thawed = self._loramix.thawed
        let_through(other, model)
        add(model, name, other)


if TYPE_CHECKING:

    class _Peft(PeftMethods, PreTrainedModel):  # pyright: ignore
        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    class _XLora(LoadingMethods, PreTrainedModel): ...  # pyright: ignore
else:
    _Peft = _XLora = ABC


class PeftModel(_Peft):
    """Any model with experts on it: `isinstance(model, PeftModel)` holds for what `get_peft_model` returns.

    The model's own class keeps its own `from_pretrained`; this one only recognises it.
    """

    @staticmethod
    def from_pretrained(
        model: PreTrainedModel,
        model_id: str | PathLike[str],
        adapter_name: str = ADAPTER_NAME,
        is_trainable: bool = False,
        config: PeftConfig | PeftsConfig | None = None,
        *,
        adapters: Mapping[str, str] | None = None,
        base_weights_of: str | None = None,
        drop_unsupported: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **hub: Any,
    ) -> PeftModel:
        """Put a saved mixture, or one saved LoRA expert, on a base model.

        Args:
            model: the base model; it becomes the result. Experts that it carries are taken out first, with a warning.
            model_id: a folder, or a Hub identifier.
            adapter_name: what the mixture is called among several (`load_mixture`), and the key of `peft_config`.
            is_trainable: whether what was trained trains on; otherwise nothing requires gradients.
            config: a configuration to use instead of the saved one: of the same kind, for the same tensors; it may be
                one of PEFT's. Experts that it names otherwise than the saved one count as `adapters`.
            adapters: experts to use instead of the saved ones: the same names replace by name, all-new names replace
                in order and become the names.
            base_weights_of: as for `get_peft_model`; what a saved mixture holds itself comes first.
            drop_unsupported: as for `get_peft_model`.
            key_mapping: as in PEFT: regular expressions, and what they become in the paths of experts. Names of older
                transformers need none.
            **hub: revision, subfolder, token, cache_dir, local_files_only, force_download. Further arguments that
                PEFT takes (`torch_device`, `device_map`, `dtype`, `low_cpu_mem_usage`, …) are taken and mean nothing:
                experts go where the base model's layers are, in their dtype.

        Raises:
            CheckpointError: files that are missing, broken or incomplete.
            AdapterError: an expert that this base model cannot carry.
            ConfigurationError: settings that cannot work.
            ModelError: a base model that cannot carry a mixture.
        """
        options = _options(hub)
        config = copy.deepcopy(as_own(config))
        location = Location(model_id, options)
        supported = functools.partial(_supported, model, base_weights_of=base_weights_of, drop=drop_unsupported)
        with replacing(model):
            check_plain(model)
            unpack(model)
            if kind_at(location) == "expert":
                lora = _of_kind(config, LoraConfig, model_id)
                if adapters is not None:
                    raise ConfigurationError(
                        "adapters= replaces the experts of a mixture.",
                        received=f"adapters={adapters!r} for {str(model_id)!r}, which is one expert",
                        remedy="leave adapters= out, or build a mixture with get_peft_model(base, XLoraConfig(…))",
                    )
                (adapter,) = supported([read_expert(location, adapter_name, lora).mapped(key_mapping or {})])
                return _build_lora(model, adapter, base_weights_of, trainable=is_trainable)
            saved = read_mixture(location, adapters, _of_kind(config, XLoraConfig, model_id))
            saved.config.inference_mode = not is_trainable
            own = functools.partial(own_rows, chosen=base_weights_of, given=saved.base_weights)
            experts = supported([expert.mapped(key_mapping or {}) for expert in saved.experts])
            result = _build_mixture(model, adapter_name, saved.config, experts, saved, own, trainable=is_trainable)
        return result if is_trainable else result.eval()


class XLoraModel(PeftModel, _XLora):
    """A mixture: `isinstance(model, XLoraModel)` tells it from a plain LoRA model."""


# Registered, not inherited: a model with the methods is an instance, also when unpickled.
cast(ABCMeta, PeftModel).register(PeftMethods)
cast(ABCMeta, XLoraModel).register(XLoraMethods)


@overload
def get_peft_model(
    model: PreTrainedModel, peft_config: XLoraConfig, adapter_name: str = ADAPTER_NAME, mixed: bool = ..., **hub: Any
) -> XLoraModel: ...


@overload
def get_peft_model(
    model: PreTrainedModel,
    peft_config: PeftConfig | PeftsConfig,
    adapter_name: str = ADAPTER_NAME,
    mixed: bool = ...,
    **hub: Any,
) -> PeftModel: ...


def get_peft_model(
    model: PreTrainedModel,
    peft_config: PeftConfig | PeftsConfig,
    adapter_name: str = ADAPTER_NAME,
    mixed: bool = False,
    *,
    base_weights_of: str | None = None,
    drop_unsupported: bool = False,
    **hub: Any,
) -> PeftModel:
    """Make a mixture of a base model and the experts a configuration names, with a new router; or a new LoRA expert.

    Args:
        model: the base model; it becomes the result. Experts that it carries are taken out first, with a warning. It
            is left as it was if anything here fails.
        peft_config: an `XLoraConfig`, or a `LoraConfig` to train a new expert with; or one of PEFT's, which is read by
            its fields. The model keeps a copy.
        adapter_name: as for `PeftModel.from_pretrained`; the name of a new expert.
        mixed: likewise; False.
        base_weights_of: the expert whose embeddings and head are used where the experts were saved with different
            ones: all experts of a mixture share them.
        drop_unsupported: whether what this mixture cannot carry of an expert is left out, with a warning that names it:
            modules that no expert can adapt, and saved weights that are not the base model's, or in which experts
            disagree. Otherwise such an expert is refused.
        **hub: as for `PeftModel.from_pretrained`, for the experts; but `revision` is the base model's, as in PEFT, and
            kept in the configuration. An expert says its own: "user/repo@revision".

    Raises:
        ConfigurationError, CheckpointError, AdapterError, ModelError: as `PeftModel.from_pretrained`.
    """
    peft_config = as_own(peft_config)
    if not isinstance(peft_config, XLoraConfig | LoraConfig) or mixed:
        kind = type(peft_config)
        raise ModelError(
            "A model is built from one loramix.XLoraConfig or loramix.LoraConfig.",
            received="mixed=True" if mixed else f"a {kind.__module__}.{kind.__qualname__}",
            remedy="pass XLoraConfig(adapters={…}) or LoraConfig(target_modules=…), imported from loramix",
        )
    config = copy.deepcopy(peft_config)
    config.revision = hub.pop("revision", config.revision)
    options = _options(hub)
    with replacing(model):
        check_plain(model)
        unpack(model)
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = identifier_of(model)
        if isinstance(config, LoraConfig):
            return _build_lora(model, new_adapter(adapter_name, model, config), base_weights_of, trainable=True)
        checked_router(config, len(config.adapters), hidden_size_of(model))
        new = config.new_experts
        found = [
            new_member(model, config, name) if name in new else read_expert(Location(place, options), name)
            for name, place in config.adapters.items()
        ]
        settle_new(config)
        experts = _supported(model, found, base_weights_of=base_weights_of, drop=drop_unsupported)
        own = functools.partial(own_rows, chosen=base_weights_of)
        trainable = not config.inference_mode
        return _build_mixture(model, adapter_name, config, experts, None, own, trainable=trainable, new=new)


def _supported(
    model: PreTrainedModel, experts: Sequence[Adapter], *, base_weights_of: str | None, drop: bool
) -> Sequence[Adapter]:
    """The experts, without what a mixture cannot carry if `drop`."""
    if not drop:
        return experts
    return without_unsupported(model, [on_base(model, expert) for expert in experts], base_weights_of)


def _options(hub: Mapping[str, Any]) -> HubOptions:
    """Raises ConfigurationError: an unknown argument, or one of PEFT's whose meaning a mixture cannot keep."""
    for name, harmless in _ONLY_WITHOUT_EFFECT.items():
        if hub.get(name) not in harmless:
            raise ConfigurationError(
                "Arguments that PEFT takes are taken where they mean nothing here.",
                received=f"{name}={hub[name]!r}",
                remedy=f"leave {name} out",
            )
    ignored = _ONLY_PEFTS | _ONLY_WITHOUT_EFFECT.keys()
    options = {name: value for name, value in hub.items() if name not in ignored}
    token = options.pop("use_auth_token", None)  # as it was called once
    return HubOptions.from_kwargs(options if token is None else {"token": token, **options})


_PLACES = (
    "torch_device",
    "device_map",
    "max_memory",
    "offload_dir",
    "offload_folder",
    "offload_index",
    "offload_buffers",
)
_DTYPES = ("dtype", "torch_dtype", "autocast_adapter_dtype", "low_cpu_mem_usage", "ephemeral_gpu_offload")
_FILES = ("use_safetensors", "safe_serialization", "trust_remote_code", "proxies", "resume_download")
_ONLY_PEFTS = frozenset((*_PLACES, *_DTYPES, *_FILES))
_ONLY_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "ignore_mismatched_sizes": (None, False),
    "repo_type": (None, "model"),
}


def _of_kind(
    config: PeftConfig | PeftsConfig | None, kind: type[_Config], model_id: str | PathLike[str]
) -> _Config | None:
    if config is not None and not isinstance(config, kind):
        raise ConfigurationError(
            "config= is of the kind of the saved one.",
            received=f"a {type(config).__name__} for {str(model_id)!r}, which needs a {kind.__name__}",
            remedy=f"pass a {kind.__name__}, or leave config= out",
        )
    return config


def _build_mixture(
    model: PreTrainedModel,
    name: str,
    config: XLoraConfig,
    experts: Sequence[Adapter],
    saved: MixtureCheckpoint | None,
    find_own: Callable[[PreTrainedModel, Sequence[Adapter]], list[OwnRows]],
    *,
    trainable: bool,
    new: Collection[str] = (),
) -> PeftModel:
    hidden_size = hidden_size_of(model)
    kind = checked_router(config, len(experts), hidden_size)
    config.hidden_size = hidden_size
    experts = [on_base(model, expert) for expert in experts]
    sites = plan(model, experts)
    router = kind.build(config, router_sizes(sites, hidden_size, len(experts)))
    names = [expert.name for expert in experts]
    replaced = [] if saved is None else [names.index(expert) for expert in saved.replaced]
    if saved is not None:
        router.load(saved.router, replaced)
    router.requires_grad_(trainable).train(model.training)
    given = given_scalings(config, sites)
    others = [site for site in sites if site.path not in given]
    backbones = find_backbones(model, others, names)
    refuse_meta(sites)
    head = head_site(model, others)
    if head is not None:
        check_head(head, names, kind)
    check_blocks(sites, names, kind)
    routed = issubclass(kind, HiddenStateRouter | TextRouter)
    uses = check_uses(model, backbones, sites, names, routed=routed, given=given)
    if uses.told and not uses.seeing_encoder:
        backbones = Backbones(backbones.main)
    if routed:
        check_widths(backbones, hidden_size)
    if issubclass(kind, TextRouter):
        check_embeddings(backbones.main, hidden_size, has_encoder=backbones.encoder is not None)
    training = [i for i, name in enumerate(names) if config.use_trainable_adapters or name in new]
    layers = adapt(sites, names, training=training, dtype=model.dtype)
    if saved is None or replaced:
        router.follow([layer.stack.parts for layer in layers.values()])
    parts = [module for module in backbones.main.modules() if next(module.parameters(recurse=False), None) is not None]
    router.to(device_of(parts[-1]))  # where the last hidden state comes out
    state = MixtureState(config, experts, layers, router, hidden_size, uses)
    state.name, state.head = name, None if head is None else head.path
    state.new = tuple(new)
    _set_apart(layers, state, uses)
    _commit(model, backbones, layers, state, LoadingMethods, find_own(model, experts))
    _set_trainable(layers, training if trainable else ())
    return cast(XLoraModel, model)


def _set_apart(layers: Mapping[str, XLoraLayer], state: AdaptedState, uses: BaseUses) -> None:
    for path in uses.apart:
        layers[path].apart = state.apart


def _build_lora(model: PreTrainedModel, adapter: Adapter, base_weights_of: str | None, *, trainable: bool) -> PeftModel:
    adapter = on_base(model, adapter)
    adapter.config.inference_mode = not trainable
    sites = plan(model, [adapter])
    backbones = find_backbones(model, sites, [adapter.name])
    refuse_meta(sites)
    head = head_site(model, sites)
    uses = check_uses(model, backbones, sites, [adapter.name], routed=False)
    layers = adapt(sites, [adapter.name], training=[0], dtype=model.dtype)
    state = AdaptedState(adapter.config, [adapter], layers)
    state.name, state.head = adapter.name, None if head is None else head.path
    _set_apart(layers, state, uses)
    _commit(model, backbones, layers, state, PeftMethods, own_rows(model, [adapter], base_weights_of))
    _set_trainable(layers, [0] if trainable else ())
    return cast(PeftModel, model if trainable else model.eval())


def _commit(
    model: PreTrainedModel,
    backbones: Backbones,
    layers: Mapping[str, XLoraLayer],
    state: AdaptedState,
    methods: type,
    own: Sequence[OwnRows],
) -> None:
    """Change the model. All checks have been made: nothing in here may fail."""
    state.thawed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    route_checkpoints(model)
    put_rows(model, state, own)
    for path, layer in layers.items():
        if f"{path}.weight" in state.replaced:
            layer.stack.settle(layer.base_layer)
        put_on(model, path, layer)
    if isinstance(state, MixtureState):
        model.add_module(state.router.attribute, state.router)
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    parts = [part for part in models if any(module in backbones for module in part.modules())]
    for part in parts:
        part.__dict__["_loramix"] = state
        is_root, role = part is model, _role(part, backbones)
        first, last = (methods, object) if is_root else (PartMethods, ThroughBaseModel)
        part.__class__ = specialise(type(part), first, last=last, role=role, is_root=is_root)
    let_through(model)
    for part in parts:
        rebind_forward(part)


def _role(part: PreTrainedModel, backbones: Backbones) -> Role:
    if part is backbones.main:
        return "backbone" if backbones.encoder is None else "decoder"
    return "encoder" if part is backbones.encoder else "around"


def _set_trainable(layers: Mapping[str, XLoraLayer], training: Collection[int]) -> None:
    for layer in layers.values():
        layer.stack.requires_grad_(any(expert in training for expert in layer.stack.members))
