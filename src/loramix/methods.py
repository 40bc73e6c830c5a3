"""The methods that a model gains when experts are put on it: PEFT's interface, on a transformers model.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from types import MappingProxyType
from typing import Any, NoReturn, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from loramix import checkpoint
from loramix.adapter import Adapter
from loramix.classifier import XLoraClassifier
from loramix.config import LoraConfig, PeftConfig, PeftType, XLoraConfig
from loramix.errors import ConfigurationError, RoutingError, UnsupportedOperationError
from loramix.fixed import merge, put
from loramix.hooks import Made, RoutingHook
from loramix.inject import replace
from loramix.layers import XLoraLayer
from loramix.lockstep import Lockstep, LockstepReport, asked, decoding, paused, session_of, tell, wanted_by
from loramix.passes import MixtureState, Specialised, attach
from loramix.scalings import ConstantRouting, TensorRouting, Watched, override
from loramix.single import single_adapter

CLASSIFIER = "internal_xlora_classifier"
ADAPTER_NAME = "default"


_NO_TRAINER = cast("Mapping[str, Tensor]", MappingProxyType({}))
"""What `save_pretrained` takes its `state_dict` for when nobody gives one, not even None, as trainers do."""

_TAKEN_ON_SAVE = frozenset(
    {
        *("safe_serialization", "max_shard_size", "save_function", "variant", "token", "save_peft_format"),
        *("selected_adapters", "save_embedding_layers", "path_initial_model_for_weight_conversion"),
    }
)


class PeftMethods:
    """What a model gains when experts are put on it."""

    _loramix: MixtureState
    internal_xlora_classifier: XLoraClassifier

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The live configuration, under the name "default"."""
        return {ADAPTER_NAME: self._loramix.config}

    @property
    def active_peft_config(self) -> PeftConfig:
        """The live configuration."""
        return self._loramix.config

    @property
    def peft_type(self) -> PeftType:
        """XLORA for a mixture, LORA for a plain LoRA model."""
        return PeftType(self._loramix.config.peft_type)

    @property
    def active_adapter(self) -> str:
        """The name under which `peft_config` holds the configuration."""
        return ADAPTER_NAME

    @property
    def active_adapters(self) -> list[str]:
        """Likewise, as a list."""
        return [ADAPTER_NAME]

    @property
    def expert_names(self) -> list[str]:
        """The E experts, in the order of their scalings."""
        return list(self._loramix.names)

    @property
    def adapted_modules(self) -> list[str]:
        """Paths of the L adapted modules, in the order of their scalings."""
        return list(self._loramix.paths)

    def get_base_model(self) -> PreTrainedModel:
        """The model itself: the base model with the adapted layers in place."""
        return cast(PreTrainedModel, self)

    def unload(self) -> PreTrainedModel:
        """Take the experts out again: the plain base model, the same object."""
        model, state = cast(PreTrainedModel, self), self._loramix
        for path, layer in _layers(model).items():
            replace(model, path, layer.base_layer)
        if state.classifier is not None:
            delattr(model, CLASSIFIER)
        for part in [module for module in model.modules() if isinstance(module, Specialised)]:
            part.restore()
        for name in state.thawed:
            model.get_parameter(name).requires_grad_(True)
        return model

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside, in this thread, the model is its base model: one pass, no experts. Nests."""
        return override(self._loramix, lambda: ConstantRouting(0.0))

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        self._loramix.enabled = True

    def disable_adapter_layers(self) -> None:
        """Make the model its base model, in every thread, until `enable_adapter_layers`."""
        self._loramix.enabled = False

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are."""
        parameters = list(cast(nn.Module, self).parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print both, and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = _NO_TRAINER,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> None:
        """Write the adapter: a mixture with its router and its experts, or one LoRA expert (SEMANTICS §4).

        With `state_dict=`, as trainers call it, what trains is also written as `model.safetensors`, by the model's own
        keys: transformers' Trainer resumes from that file, and reads its best model from it. `from_pretrained` does
        not look at it.

        Args:
            save_directory: the folder; what lies there and is not ours is left alone.
            is_main_process: whether this process writes.
            state_dict: whole tensors to write instead of the model's own, by the model's own keys; all, some, or None.
            push_to_hub: upload the folder afterwards.
            **hub: for `PreTrainedModel.push_to_hub`: repo_id, token, private, … What transformers, accelerate and PEFT
                pass to a `save_pretrained` is taken and means nothing here.

        Raises:
            ConfigurationError: another argument.
            SaveError: the folder could not be written; what it held is still in place.
        """
        unknown = sorted(set(hub) - _TAKEN_ON_SAVE) if not push_to_hub else []
        if unknown or hub.get("safe_serialization") is False:
            raise ConfigurationError(
                "A mixture is saved as safetensors, and takes further arguments only for push_to_hub=True.",
                received=", ".join(unknown) or "safe_serialization=False",
                remedy=f"leave {'them' if len(unknown) > 1 else 'it'} out",
            )
        hub = {name: value for name, value in hub.items() if name not in _TAKEN_ON_SAVE or name == "token"}
        if is_main_process:
            _save(cast(PreTrainedModel, self), save_directory, state_dict)
        if push_to_hub:
            cast(Any, self).push_to_hub(hub.pop("repo_id", str(save_directory)), **hub)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Trainer refuses to train a quantised model that says no here."""
        return bool(getattr(self, "is_quantized", False))

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """What a trainer's checkpoint lacks on purpose: all that does not train."""
        model = cast(nn.Module, self)
        training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return [name for name in model.state_dict() if name not in training]

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> PreTrainedModel:
        """Merge the experts into the weights of the base model, where their scalings are the same for every token.

        That is so for a plain LoRA model, and for a mixture after `fix_routing(…)` or inside `fixed_scalings(…)`.

        Args:
            progressbar: kept for PEFT's sake, like the next two.
            safe_merge: weights are always checked before any is changed.
            adapter_names: None, or `["default"]`.

        Returns:
            The base model, the same object, without experts.

        Raises:
            UnsupportedOperationError: every token has scalings of its own, or a base layer is quantised; nothing was
                changed.
        """
        model, state = cast(PreTrainedModel, self), self._loramix
        routing = state.single_pass()
        if routing is None or adapter_names not in (None, [ADAPTER_NAME]):
            raise UnsupportedOperationError(
                "Only experts whose scalings are the same for every token can be merged into the base model.",
                received=f"merge_and_unload() on a mixture of {', '.join(self.expert_names)}, which routes each token"
                if routing is None
                else f"adapter_names={adapter_names!r}",
                remedy="keep the experts beside the base model, or call model.fix_routing([…]) before",
            )
        assert not isinstance(routing, Watched)
        merged = merge(_layers(model), routing)
        self.unload()
        put(model, merged)
        return model

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: what is merged leaves the model."""
        _refuse("merge_adapter", "merge_and_unload(), inside fixed_scalings([…]) for a mixture")

    def unmerge_adapter(self) -> NoReturn:
        """Likewise."""
        _refuse("unmerge_adapter", "the model before merge_and_unload(): nothing is merged while experts are there")

    def load_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not possible: the experts of a mixture are its configuration's."""
        _refuse("load_adapter", "PeftModel.from_pretrained(base, checkpoint, adapters={…}) to replace experts")

    def add_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Likewise."""
        _refuse("add_adapter", "get_peft_model(base, XLoraConfig(adapters={…})) with all experts")

    def set_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Likewise."""
        _refuse("set_adapter", "fixed_scalings([…]) to run chosen experts only")

    def delete_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Likewise."""
        _refuse("delete_adapter", "unload(), or build the mixture anew without the expert")

    def enable_adapters(self) -> NoReturn:
        """Likewise."""
        _refuse("enable_adapters", "enable_adapter_layers()")

    def disable_adapters(self) -> NoReturn:
        """Likewise."""
        _refuse("disable_adapters", "disable_adapter_layers(), or the context manager disable_adapter()")

    def get_adapter_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Likewise."""
        _refuse("get_adapter_state_dict", "save_pretrained(folder)")


class XLoraMethods(PeftMethods):
    """What a mixture has beside them: its scalings, and what can be changed while it runs.

    Every change goes into the model's own configuration, counts from the next forward, and is saved.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = None if args else session_of(self._loramix)
        if session is not None:
            with paused():
                out = session.step(super().__call__, kwargs)  # pyright: ignore
            if out is not None:
                return out
        return super().__call__(*args, **kwargs)  # pyright: ignore

    def generate(self, *args: Any, lockstep: bool | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with both passes in one forward per token where that is exact and pays.

        Args:
            *args: as for the base model.
            lockstep: True: wherever it is exact; False: never; None: what `generation_config.lockstep` says, else
                while it is measured to be the cheaper way. The text is the same.
            **kwargs: as for the base model.

        Returns:
            What the base model's `generate` returns; `lockstep_report` then says how it went.
        """
        self._loramix.report = None
        with asked(lockstep):
            out = super().generate(*args, **kwargs)  # pyright: ignore
        report, after = self._loramix.report, self._loramix.fixed_after
        reason = "only greedy decoding and sampling can" if report is None else report.reason
        if reason is not None and (lockstep or after):
            tell(reason, "lockstep=True" if lockstep else f"fix_routing(after={after})")
        return out

    @property
    def lockstep_report(self) -> LockstepReport | None:
        """How the last `generate` decoded: forwards per token, and the share of right drafts; None before the first."""
        return self._loramix.report

    def _sample(self, input_ids: Tensor, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        call, state = super()._sample, self._loramix  # pyright: ignore
        wanted = wanted_by(generation_config)
        reason = _no_lockstep(self, state, wanted, generation_config, kwargs.get("past_key_values"))
        if reason is not None:
            state.report = LockstepReport(reason=reason)
        else:
            ends = getattr(generation_config, "_eos_token_tensor", None)
            session = Lockstep(self, state, wanted, ends)
            state.report = session.report
            with decoding(session):
                return call(input_ids, *args, generation_config=generation_config, **kwargs)
        return call(input_ids, *args, generation_config=generation_config, **kwargs)

    @property
    def internal_xlora_scalings(self) -> Float[Tensor, "B S L E"] | None:
        """The scalings of the last forward, before top-k, detached; None before the first."""
        return self._loramix.latest

    def get_latest_scalings(self) -> Float[Tensor, "B S L E"] | None:
        """The same."""
        return self._loramix.latest

    def fixed_scalings(self, values: Tensor | Sequence[float]) -> AbstractContextManager[None]:
        """Inside, in this thread, one pass with the same final scalings for every token.

        Args:
            values: (E,) for all layers alike, or (L, E).

        Raises:
            RoutingError: another shape.
        """
        rows = self._checked_scalings(values)
        return override(self._loramix, lambda: self._loramix.fixed_routing(rows))

    def _checked_scalings(self, values: Tensor | Sequence[float]) -> Tensor:
        shapes = [(len(self.expert_names),), (len(self.adapted_modules), len(self.expert_names))]
        try:
            scalings = torch.as_tensor(values, dtype=torch.float32, device=cast(Any, self).device)
        except (TypeError, ValueError, RuntimeError):
            scalings = torch.empty(0)
        if tuple(scalings.shape) not in shapes or not bool(torch.isfinite(scalings).all()):
            raise RoutingError(
                "Fixed scalings hold one finite number for each expert, or for each layer and expert.",
                received=f"{values!r}",
                remedy=f"pass shape {shapes[0]} for {', '.join(self.expert_names)}, or {shapes[1]}",
            )
        return scalings if scalings.dim() == 2 else scalings.unsqueeze(0)

    def fix_routing(
        self,
        scalings: Tensor | Sequence[float] | None = None,
        *,
        prompt: Mapping[str, Tensor] | None = None,
        after: int | None = None,
    ) -> None:
        """From now on, in every thread, one pass per token, with the same scalings; until `unfix_routing()`.

        What is fixed is not saved; `merge_and_unload()` and `save_fixed()` make plain weights, or one adapter, of it.

        Args:
            scalings: (E,) for all layers alike, or (L, E).
            prompt: a model input (`input_ids`, `attention_mask`, …): the mean of its tokens' final scalings.
            after: in each generation, route that many tokens after the prompt, and keep the mean of their final
                scalings, for each row its own. Forwards outside `generate` go on routing.

        Raises:
            ConfigurationError: none of them, or several, or `after` below 1.
            RoutingError: scalings of another shape.
        """
        if sum(given is not None for given in (scalings, prompt, after)) != 1 or (after is not None and after < 1):
            raise ConfigurationError(
                "Routing is fixed by scalings, from a prompt, or after a number of tokens: by one of them.",
                received=f"scalings={scalings!r}, prompt={prompt!r}, after={after!r}",
                remedy="pass for example fix_routing([0.5, 0.5]), or fix_routing(after=32)",
            )
        self.unfix_routing()
        if after is not None:
            self._loramix.fixed_after = after
        elif prompt is not None:
            self._loramix.fixed = mean_scalings(cast(Any, self), prompt)
        else:
            self._loramix.fixed = self._checked_scalings(cast(Any, scalings))

    def unfix_routing(self) -> None:
        """Route each token again."""
        self._loramix.fixed = self._loramix.fixed_after = None

    @property
    def fixed_routing(self) -> Float[Tensor, "L E"] | None:
        """The scalings that `fix_routing` fixed, or None."""
        fixed = self._loramix.fixed
        return None if fixed is None else fixed.expand(len(self.adapted_modules), -1)

    def save_fixed(self, save_directory: str | PathLike[str], *, rank: int | None = None) -> float:
        """Save a mixture whose routing is fixed as one LoRA adapter, in PEFT's format.

        Args:
            save_directory: the folder.
            rank: of each layer at most, by truncated singular values; None puts the experts side by side, exactly.

        Returns:
            What is left out: the Frobenius norm of the difference of the weights, relative to what the experts add.

        Raises:
            UnsupportedOperationError: the routing is not fixed, or an expert has DoRA or a bias.
            SaveError: the folder could not be written.
        """
        routing = self._loramix.single_pass()
        if not isinstance(routing, TensorRouting):
            raise UnsupportedOperationError(
                "One adapter holds a mixture whose scalings are the same for every token.",
                received=f"save_fixed() on a mixture of {', '.join(self.expert_names)}, which routes each token",
                remedy="call fix_routing(…) before, or use save_pretrained(folder)",
            )
        like = self._loramix.experts[0].config
        adapter, error = single_adapter(_layers(cast(PreTrainedModel, self)), routing, like, rank=rank)
        checkpoint.save_adapter(save_directory, adapter)
        return error

    def set_topk_lora(self, value: int | None) -> None:
        """Keep the `value` largest scalings of each token; all with None.

        Raises:
            ConfigurationError: less than 1, or more than there are experts.
        """
        self._change(top_k_lora=value)

    def get_global_scaling_weight(self) -> float:
        """g, the factor on what the experts add."""
        return self._xlora_config.global_scaling_weight

    def set_global_scaling_weight(self, weight: float) -> None:
        """Change g.

        Raises:
            ConfigurationError: not a finite number.
        """
        self._change(global_scaling_weight=weight)

    def set_softmax_temperature(self, temperature: float) -> None:
        """Change the temperature of the softmax over the experts: lower is sharper.

        Raises:
            ConfigurationError: not a positive number.
        """
        self._change(softmax_temperature=temperature)

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Change every expert's scaling in the scaling pass; None means 1 / E.

        Raises:
            ConfigurationError: not a finite number.
        """
        self._change(scaling_pass_value=1 / len(self.expert_names) if value is None else value)

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every forward from now on, up to the log's capacity."""
        self._loramix.log.enabled = True

    def disable_scalings_logging(self) -> None:
        """Stop keeping them; what is logged stays."""
        self._loramix.log.enabled = False

    def clear_scalings_log(self) -> None:
        """Forget what is logged."""
        self._loramix.log.clear()

    def get_scalings_log(self) -> list[Float[Tensor, "B S L E"]]:
        """The logged scalings, oldest first, on the CPU; S differs from forward to forward."""
        return self._loramix.log.entries()

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[Float[Tensor, "B S L E"]]]]:
        """The logged scalings by S: their positions in the log, and the tensors."""
        return self._loramix.log.bucketed()

    @property
    def _xlora_config(self) -> XLoraConfig:
        config = self._loramix.config
        assert isinstance(config, XLoraConfig)
        return config

    def _change(self, **fields: Any) -> None:
        trial = copy.copy(self._xlora_config)
        fields = {name: value.item() if hasattr(value, "item") else value for name, value in fields.items()}
        vars(trial).update(fields)
        trial.validate_for(len(self.expert_names), trial.hidden_size)
        vars(self._xlora_config).update(fields)


def _no_lockstep(
    model: Any, state: MixtureState, wanted: bool | None, generation_config: Any, cache: Any
) -> str | None:
    if wanted is False and state.fixed_after is None:
        return "it was not wanted"
    if state.single_pass() is not None:
        return "there is only one pass"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder reads its encoder's scalings"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if not generation_config.use_cache:
        return "there is no cache"
    if getattr(cache, "is_compileable", False):
        return "the cache is a static one"
    if generation_config.is_assistant or model.device.type == "mps":
        return "an assistant, or a device that stops late, decodes"
    return None


class _Final(RoutingHook):
    """Keeps the final scalings of one forward."""

    def __init__(self) -> None:
        self.final = torch.empty(0)

    def made(self, made: Made) -> None:
        self.final = made.final.detach()


@torch.no_grad()
def mean_scalings(model: Any, prompt: Mapping[str, Tensor]) -> Float[Tensor, "L E"]:
    """The mean of a text's final scalings over its real tokens."""
    hook, was_training = _Final(), model.training
    detach = attach(model, hook)
    model.eval()
    try:
        inputs = {name: value.to(model.device) for name, value in prompt.items()}
        model(**inputs, use_cache=False)
    finally:
        detach()
        model.train(was_training)
    mask = inputs.get("attention_mask")
    return hook.final.flatten(0, 1).mean(0) if mask is None else hook.final[mask.to(torch.bool)].mean(0)


def _layers(model: PreTrainedModel) -> dict[str, XLoraLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, XLoraLayer)}


def _save(model: PreTrainedModel, folder: str | PathLike[str], given: Mapping[str, Tensor] | None) -> None:
    state = cast(PeftMethods, model)._loramix  # pyright: ignore[reportPrivateUsage]
    tensors = model.state_dict() | dict(given or {})
    experts = _experts(model, state, tensors)
    training = {name: tensors[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer_state = training if given is not _NO_TRAINER and training else None
    if isinstance(state.config, LoraConfig):
        checkpoint.save_adapter(folder, experts[0], trainer_state)
        return
    assert isinstance(state.config, XLoraConfig)
    prefix = f"{CLASSIFIER}."
    router = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    checkpoint.save_mixture(folder, state.config, router, experts, trainer_state)


def _experts(model: PreTrainedModel, state: MixtureState, tensors: Mapping[str, Tensor]) -> list[Adapter]:
    """The experts as they are now, from the stacked tensors."""
    experts = [dataclasses.replace(expert, weights={}) for expert in state.experts]
    for path, layer in _layers(model).items():
        own = {name: tensors[f"{path}.{name}"] for name, _ in layer.named_parameters(recurse=False)}
        for expert, weights in layer.unstack(own).items():
            experts[expert].weights[path] = weights
    return experts


def _refuse(call: str, remedy: str) -> NoReturn:
    raise UnsupportedOperationError(
        "A mixture's experts are fixed when it is built.", received=f"{call}()", remedy=f"use {remedy}"
    )
