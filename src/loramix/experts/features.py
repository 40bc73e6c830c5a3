"""Which features of an expert a mixture cannot carry; the configuration alone tells."""

from __future__ import annotations

from loramix.config.lora import LoraConfig
from loramix.errors import UnsupportedAdapterError

_WITHOUT_MEANING_HERE = (
    "modules_to_save",
    "target_parameters",
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
    """The settings of an expert, as "field=value", that a mixture cannot carry; empty for those that it can.

    Initialisations such as PiSSA's change the base model's weight: experts trained that way belong to another base
    than the other experts do, unless PEFT converted them to plain LoRA on saving (and then the field says True).
    Fields that matter only during training, such as `eva_config`, are no hindrance.
    """
    found = [f"{name}={getattr(config, name)!r}" for name in _WITHOUT_MEANING_HERE if getattr(config, name)]
    if config.bias != "none":
        found.append(f"bias={config.bias!r}")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
        found.append(f"init_lora_weights={init!r}")
    return found


def refuse_unsupported(config: LoraConfig, name: str) -> None:
    """Raise where an expert has a feature that a mixture cannot carry.

    Args:
        config: the expert's.
        name: the expert's name, for the message.

    Raises:
        UnsupportedAdapterError: naming the expert and every such feature.
    """
    found = unsupported_features(config)
    if not found:
        return
    changed_base = any(feature.startswith("init_lora_weights") for feature in found)
    convert = " (PEFT converts it on saving: path_initial_model_for_weight_conversion)" if changed_base else ""
    raise UnsupportedAdapterError(
        "A mixture carries LoRA, rsLoRA, DoRA and LoRA biases, and no other features of an expert.",
        received=f"expert {name!r} with {', '.join(found)}",
        remedy=f"Leave this expert out, or train it without them{convert}.",
    )
