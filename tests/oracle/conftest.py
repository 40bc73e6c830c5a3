from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

EXPERTS: dict[str, list[dict[str, Any]]] = {
    "ranks": [{"r": 2}, {"r": 3, "lora_alpha": 12}, {"r": 4}],
    "ragged": [
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {
            "target_modules": ["o_proj", "gate_proj", "down_proj"],
            "rank_pattern": {"down_proj": 6},
            "alpha_pattern": {r"layers\.1\.self_attn\.o_proj": 32},
        },
        {"layers_to_transform": [1], "layers_pattern": "layers"},
    ],
    "embedding": [{"target_modules": ["embed_tokens", "v_proj"]}, {"target_modules": ["embed_tokens"], "r": 2}],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[str, ...]]:
    """(architecture, a key of EXPERTS) -> the experts' folders, written by PEFT once."""
    from support.peft_side import write_expert
    from support.tiny import ARCHITECTURES, TARGETS

    @functools.cache
    def of(architecture: str, kind: str) -> tuple[str, ...]:
        root = tmp_path_factory.mktemp(f"{architecture}-{kind}")
        base = ARCHITECTURES[architecture]
        common = {"target_modules": TARGETS[architecture], "fan_in_fan_out": architecture == "gpt2"}
        return tuple(
            write_expert(root / str(i), base(), seed=i, **{**common, **config})
            for i, config in enumerate(EXPERTS[kind])
        )

    return of
