"""The methods that a model gains when experts are put on it: PEFT's interface, on a transformers model.

B, S: batch, sequence. L: adapted layers. E: experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loramix import formats
from loramix.config.base import PeftConfig, PeftType
from loramix.errors import ConfigurationError, UnsupportedOperationError
from loramix.experts.adapter import Adapter
from loramix.experts.offload import KeptTensors, refuse_held
from loramix.formats.card import save_card
from loramix.formats.mixture import MixtureCheckpoint
from loramix.layers.inject import take_off
from loramix.layers.layer import STACK, XLoraLayer
from loramix.layers.merge import merge, put
from loramix.layers.routing import ConstantRouting, Routing
from loramix.layers.slot import override
from loramix.model.own_weights import own_weights, restore_rows, saved_weights, with_base_weights
from loramix.model.peft_names import RefusedMethods, refuse_adapter_names
from loramix.model.several import keep_one
from loramix.model.sharing import Evaluated, Picture, card_of, upload
from loramix.passes.specialise import Specialised
from loramix.passes.state import AdaptedState, MixtureState
from loramix.routers.classifier import XLoraClassifier

ADAPTER_NAME = "default"


_NO_TRAINER: Mapping[str, Tensor] = MappingProxyType({})
"""The default of `save_pretrained(state_dict=…)`: the argument was left out. Trainers pass it, at times as None."""

_TAKEN_ON_SAVE = frozenset(
    {
        *("safe_serialization", "max_shard_size", "save_function", "variant", "token", "save_peft_format"),
        *("selected_adapters", "save_embedding_layers", "path_initial_model_for_weight_conversion"),
    }
)


class PeftMethods(RefusedMethods):
    """The methods that a model gains when experts are put on it."""

    _loramix: AdaptedState

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The live configuration, under the name that the mixture was given: "default" if none."""
        return {self._loramix.name: self._loramix.config}

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
        """The name under which `peft_config` holds the configuration: of several mixtures, the one in use."""
        return self._loramix.name

    @property
    def active_adapters(self) -> list[str]:
        """Likewise, as a list."""
        return [self._loramix.name]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether `disable_adapter_layers` has not been called."""
        return self._loramix.enabled

    @property
    def base_model_torch_dtype(self) -> torch.dtype:
        """The dtype of the base model."""
        return self.get_base_model().dtype

    @property
    def special_peft_forward_args(self) -> frozenset[str]:
        """Arguments that PEFT's forward takes beside the base model's: none."""
        return frozenset()

    @property
    def modules_to_save(self) -> None:
        """None: copies of modules are never kept beside the base model's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_adapter_names(kwargs)
        return super().__call__(*args, **kwargs)  # pyright: ignore

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's.

        Raises:
            UnsupportedOperationError: `adapter_names`.
        """
        refuse_adapter_names(kwargs)
        return super().generate(*args, **kwargs)  # pyright: ignore

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
        """Take the experts out again, of all mixtures: the plain base model, the same object.

        Raises:
            UnsupportedOperationError: whole blocks were offloaded with the experts in them.
        """
        model, state = self.get_base_model(), self._loramix
        refuse_held(model)
        keep_one(model)
        for path, layer in layers_of(model).items():
            take_off(model, path, layer)
        restore_rows(model, state)
        if isinstance(state, MixtureState):
            delattr(model, state.router.attribute)
        for part in [module for module in model.modules() if isinstance(module, Specialised)]:
            part.restore()
        for name in state.thawed:
            model.get_parameter(name).requires_grad_(True)
        return model

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Inside, in this thread, the model is its base model: one pass, no experts. It may be nested."""
        return override(self._loramix, lambda: ConstantRouting(0.0))

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        self._loramix.enabled = True

    def disable_adapter_layers(self) -> None:
        """Make the model its base model, in every thread, until `enable_adapter_layers`."""
        self._loramix.enabled = False

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The number of trainable parameters, and of all parameters."""
        parameters = list(self.get_base_model().parameters())
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
        """Write the adapter: a mixture with its router and its experts, or one LoRA expert (docs/semantics.md §4).

        With `state_dict=`, as trainers call it, the trainable tensors are also written as `model.safetensors`, under
        the model's own keys: transformers' Trainer resumes from that file, and loads its best model from it.
        `from_pretrained` does not read it.

        Args:
            save_directory: the folder; other files in it are left alone.
            is_main_process: whether this process writes.
            state_dict: whole tensors to write instead of the model's own, by the model's own keys; all, some, or None.
            push_to_hub: upload the model afterwards, with the folder's model card if it has one.
            **hub: for `push_to_hub`: repo_id (the folder's name if it is left out), token, private, … Arguments that
                transformers, accelerate and PEFT pass to a `save_pretrained` are accepted and ignored.

        Raises:
            ConfigurationError: an unknown argument.
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
            _save(self.get_base_model(), self._loramix, save_directory, state_dict)
        if push_to_hub:
            folder = Path(save_directory)
            repo_id = hub.pop("repo_id", folder.absolute().name)
            upload(self.get_base_model(), self._content(), repo_id, folder, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        evaluation: Evaluated | Mapping[str, Any] | None = None,
        routing: Picture | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, with a model card.

        The text of a card that the repository has is kept, as `create_or_update_model_card` keeps it.

        Args:
            repo_id: the repository, which is made if it is missing.
            evaluation: as for `create_or_update_model_card`, like the next one.
            routing: a picture.
            commit_message: of the commit, like the next one.
            commit_description: more about it.
            private: whether a repository that is made is private.
            token: access token.
            revision: the branch, which is made if it is missing.
            create_pr: whether to open a pull request instead.
            max_shard_size: accepted as in transformers, without effect.
            tags: further tags of the card.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: as `create_or_update_model_card`, or the repository's card cannot be read.
            ConfigurationError: as `create_or_update_model_card`.
        """
        return upload(
            self.get_base_model(),
            self._content(),
            repo_id,
            None,
            evaluation=evaluation,
            routing=routing,
            tags=tags,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
        )

    def create_or_update_model_card(
        self,
        output_dir: str | PathLike[str],
        *,
        evaluation: Evaluated | Mapping[str, Any] | None = None,
        routing: Picture | None = None,
        repo_id: str | None = None,
    ) -> None:
        """Write the model card, README.md: base model, experts, router, how to load them, figures, a picture.

        A card that exists keeps its text: only our fields of its header and the sections between our markers change.
        An evaluation and a picture stay until they are given anew.

        Args:
            output_dir: the folder; it is made if it is missing.
            evaluation: an `Evaluation`, or what `loramix eval --json` printed.
            routing: a figure of `loramix.analysis.plots`, which is written beside the card as routing.png. A picture
                of tokens shows their text.
            repo_id: the repository on the Hub that the folder is for.

        Raises:
            ConfigurationError: an evaluation of other experts, or something else than a figure.
            CorruptCheckpointError: a README.md whose header cannot be read.
            SaveError: the files could not be written, or a routing.png that loramix did not write is there.
        """
        model = self.get_base_model()
        save_card(Path(output_dir), card_of(model, self._content(), evaluation, routing, repo_id))

    def _content(self) -> Adapter | MixtureCheckpoint:
        """What `save_pretrained` writes."""
        model = self.get_base_model()
        return _content(model, self._loramix, KeptTensors(model, {}))

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """True for a quantised model, which Trainer refuses to train otherwise."""
        return bool(getattr(self, "is_quantized", False))

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """The names that a trainer's checkpoint leaves out: all that is not trained."""
        model = self.get_base_model()
        training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        return [name for name in model.state_dict() if name not in training]

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: Sequence[str] | None = None
    ) -> PreTrainedModel:
        """Merge the experts into the weights of the base model, where their scalings are the same for every token.

        That is so for a plain LoRA model, and for a mixture after `fix_routing(…)` or inside `fixed_scalings(…)`.

        Args:
            progressbar: accepted as in PEFT, without effect.
            safe_merge: weights are always checked before any is changed.
            adapter_names: None, or `active_adapters`.

        Returns:
            The base model, the same object, without experts.

        Raises:
            UnsupportedOperationError: every token has scalings of its own, or a base layer is quantised; nothing was
                changed.
        """
        model, routing = self.get_base_model(), self._loramix.single_pass()
        if not isinstance(routing, Routing) or adapter_names not in (None, self.active_adapters):
            raise UnsupportedOperationError(
                "Only experts whose scalings are the same for every token can be merged into the base model.",
                received=f"adapter_names={adapter_names!r}"
                if isinstance(routing, Routing)
                else f"merge_and_unload() on a mixture of {', '.join(self.expert_names)}, which routes each token",
                remedy="keep the experts unmerged, or call model.fix_routing([…]) first",
            )
        merged = merge(layers_of(model), routing)
        self._loramix.replaced = {}  # the merged weights go on with these rows
        self.unload()
        put(model, merged)
        return model


class MixtureMethods(PeftMethods):
    """The base of the methods that only a mixture has."""

    internal_xlora_classifier: XLoraClassifier  # if the router is one
    _loramix: MixtureState  # pyright: ignore[reportIncompatibleVariableOverride] - set once, when the model is built


def layers_of(model: PreTrainedModel) -> dict[str, XLoraLayer]:
    """The adapted layers of a model by path, in order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, XLoraLayer)}


def _save(
    model: PreTrainedModel, state: AdaptedState, folder: str | PathLike[str], given: Mapping[str, Tensor] | None
) -> None:
    tensors = KeptTensors(model, given or {})
    content = _content(model, state, tensors)
    training = {name: tensors[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer_state = training if given is not _NO_TRAINER and training else None
    if isinstance(content, Adapter):
        formats.save_adapter(folder, content, trainer_state)
    else:
        router, base_weights = content.router, content.base_weights
        formats.save_mixture(folder, content.config, router, content.experts, trainer_state, base_weights=base_weights)


def _content(model: PreTrainedModel, state: AdaptedState, tensors: Mapping[str, Tensor]) -> Adapter | MixtureCheckpoint:
    experts = _experts(model, state, tensors)
    if not isinstance(state, MixtureState):
        return with_base_weights(experts[0], model, state, tensors)
    prefix = f"{state.router.attribute}."
    router = {name: tensors[f"{prefix}{name}"] for name in state.router.state_dict()}
    return MixtureCheckpoint(state.config, router, experts, own_weights(model, state, tensors))


def _experts(model: PreTrainedModel, state: AdaptedState, tensors: Mapping[str, Tensor]) -> list[Adapter]:
    """The experts as they are now, from the stacked tensors."""
    experts = [
        dataclasses.replace(expert, weights={}, base_weights=saved_weights(state, expert.name, tensors))
        for expert in state.experts
    ]
    for path, layer in layers_of(model).items():
        own = {name: tensors[f"{path}.{STACK}.{name}"] for name, _ in layer.stack.named_parameters()}
        for expert, weights in layer.stack.unstack(own).items():
            experts[expert].weights[path] = weights
    return experts
