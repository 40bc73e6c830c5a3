"""One call from a checkpoint to a model: the base model's identifier is in the adapter's configuration."""

from __future__ import annotations

from os import PathLike
from typing import Any, ClassVar

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from loramix.config.base import PeftConfig
from loramix.errors import CheckpointNotFoundError, ConfigurationError
from loramix.files.base_models import one_line
from loramix.files.hub import HubOptions
from loramix.files.location import Location
from loramix.formats.load import read_config
from loramix.model.build import PeftModel


class AutoPeftModel:
    """Load base model and adapter in one call. The other classes load the base model with a head for their task."""

    base_class: ClassVar[Any] = AutoModel

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        *,
        adapters: dict[str, str] | None = None,
        base_weights_of: str | None = None,
        drop_unsupported: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **base: Any,
    ) -> PeftModel:
        """Load the base model that the adapter names, then the adapter.

        Args:
            model_id: folder or Hub identifier of a mixture, or of a LoRA expert.
            adapter_name: as in `PeftModel.from_pretrained`, like the next three.
            is_trainable: whether the trained parameters can be trained further.
            config: a configuration to use instead of the saved one.
            adapters: experts to use instead of the saved ones.
            base_weights_of: the expert whose embeddings and head are used, where experts disagree.
            drop_unsupported: whether what cannot be carried of an expert is left out, with a warning.
            revision: of the adapter; the base model's is in the adapter's configuration.
            subfolder: of the adapter.
            token: access token, for adapter and base model, like the next three.
            cache_dir: where downloads are kept.
            local_files_only: use the cache only.
            force_download: download files again that are in the cache.
            **base: further arguments of the base model's `from_pretrained` (dtype, device_map, …).

        Raises:
            ConfigurationError: the adapter does not name its base model.
            CheckpointNotFoundError: the base model is not where the adapter says.
        """
        access = {
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        options = HubOptions(revision=revision, subfolder=subfolder, **access)  # pyright: ignore[reportArgumentType]
        saved = read_config(Location(model_id, options))
        if not saved.base_model_name_or_path:
            raise ConfigurationError(
                "The adapter's configuration names its base model.",
                received=f"base_model_name_or_path={saved.base_model_name_or_path!r} in {str(model_id)!r}",
                remedy="load the base model yourself and call PeftModel.from_pretrained(base, path)",
            )
        try:
            model = cls.base_class.from_pretrained(
                saved.base_model_name_or_path, revision=saved.revision or "main", **access, **base
            )
        except OSError as error:
            raise CheckpointNotFoundError(
                "The base model is where the adapter's configuration says.",
                received=f"base_model_name_or_path={saved.base_model_name_or_path!r} in {str(model_id)!r}: "
                f"{one_line(error)}",
                remedy="load the base model from where it is now, and put the adapter on it: PeftModel.from_pretrained("
                f"{cls.base_class.__name__}.from_pretrained(…), {str(model_id)!r}); or correct base_model_name_or_path",
            ) from error
        return PeftModel.from_pretrained(
            model,
            model_id,
            adapter_name,
            is_trainable,
            config,
            adapters=adapters,
            base_weights_of=base_weights_of,
            drop_unsupported=drop_unsupported,
            **vars(options),
        )


class AutoPeftModelForCausalLM(AutoPeftModel):
    """With a language-modelling head."""

    base_class = AutoModelForCausalLM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """With an encoder and a decoder."""

    base_class = AutoModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """With a head that classifies sequences."""

    base_class = AutoModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """With a head that classifies tokens."""

    base_class = AutoModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """With a head that marks the answer in a text."""

    base_class = AutoModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Without a head."""

    base_class = AutoModel
