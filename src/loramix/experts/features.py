"""Features of an expert that a mixture does not support, by the expert's configuration."""

from __future__ import annotations

from loramix.config.lora import LoraConfig
from loramix.errors import UnsupportedAdapterError

_WHY_NOT = {
    "layer_replication": "its base model repeats blocks, and a mixture has one base model for all experts",
    "megatron_config": "its layers are Megatron's",
    "alora_invocation_tokens": "it acts only on what follows these tokens, and the router alone scales an expert here",
    "use_qalora": "its layers average groups of their input first",
    "use_bdlora": "its matrices are divided into blocks",
    "arrow_config": "it routes between experts itself",
    "kasa_config": "it has singular values beside A and B",
    "velora_config": "its layers compress what they keep for the backward",
    "monteclora_config": "its matrices are drawn at random",
    "ensure_weight_tying": "it has one A and B for embeddings and head",
    "runtime_config": "it says how PEFT is to compute",
}
"""Settings of PEFT's that a mixture does not carry, and why."""
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def unsupported_features(config: LoraConfig) -> list[str]:
    """The settings of an expert that a mixture does not support, as "field=value", for most with the reason.

    Initialisations such as PiSSA's change the base model's weights: an expert trained that way belongs to another base
    model than the other experts, unless PEFT converted it to plain LoRA on saving (the field is then True). Fields
    that matter in training only, such as `eva_config`, are accepted.
    """
    found = [f"{name}={getattr(config, name)!r} ({why})" for name, why in _WHY_NOT.items() if getattr(config, name)]
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
        "A mixture carries LoRA, rsLoRA, DoRA, LoRA biases, target_parameters, modules_to_save, biases and trained "
        "tokens, and no other features of an expert.",
        received=f"expert {name!r} with {', '.join(found)}",
        remedy=f"Leave this expert out, or train it without them{convert}.",
    )
