"""Features of an expert that a mixture does not support, by the expert's configuration."""

from __future__ import annotations

from loramix.config.lora import LoraConfig
from loramix.errors import UnsupportedAdapterError

_WITHOUT_MEANING_HERE = (
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "ensure_weight_tying",
    "runtime_config",
)
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def unsupported_features(config: LoraConfig) -> list[str]:
    """The settings of an expert, as "field=value", that a mixture does not support.

    Initialisations such as PiSSA's change the base model's weights: an expert trained that way belongs to another base
    model than the other experts, unless PEFT converted it to plain LoRA on saving (the field is then True). Fields
    that matter in training only, such as `eva_config`, are accepted.
    """
    found = [f"{name}={getattr(config, name)!r}" for name in _WITHOUT_MEANING_HERE if getattr(config, name)]
    if config.bias != "none":
        found.append(f"bias={config.bias!r}")
    if config.target_parameters and (config.use_dora or config.lora_bias):
        found.append(f"{'use_dora' if config.use_dora else 'lora_bias'}=True beside target_parameters")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        found.append(f"init_lora_weights={init!r}")
    return found


def refuse_unsupported(config: LoraConfig, name: str) -> None:
    """Refuse an expert with a feature that a mixture does not support.

    Args:
        config: the expert's configuration.
        name: the expert's name, for the message.

    Raises:
        UnsupportedAdapterError: naming the expert and all such features.
    """
    found = unsupported_features(config)
    if not found:
        return
    changed_base = any(feature.startswith("init_lora_weights") for feature in found)
    convert = " (PEFT converts it on saving: path_initial_model_for_weight_conversion)" if changed_base else ""
    raise UnsupportedAdapterError(
        "A mixture supports LoRA, rsLoRA, DoRA, LoRA biases, target_parameters and modules_to_save, and no other "
        "features of an expert.",
        received=f"expert {name!r} with {', '.join(found)}",
        remedy=f"Leave this expert out, or train it without them{convert}.",
    )
