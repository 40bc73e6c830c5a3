"""A tiny base model with a byte tokenizer, its experts and labelled text, as files: what a training starts from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import tiny
from support.byte_tokenizer import byte_tokenizer

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
TEXTS = {"math": "1 + 2 = 3; 4 + 5 = 9.", "code": "def f(x): return x", "prose": "The method returns"}


@dataclass(frozen=True)
class Files:
    """Where everything is."""

    base: Path
    experts: dict[str, str]
    data: Path
    held_out: Path
    root: Path

    def settings(self, output: Path, **changes: Any) -> dict[str, Any]:
        """Settings of a short run."""
        trainer = {
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.02,
            "save_steps": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "seed": 0,
        }
        return {
            "base": str(self.base),
            "experts": dict(self.experts),
            "data": str(self.data),
            "output": str(output),
            "mixture": {"xlora_depth": 1},
            **changes,
            "trainer": trainer | changes.get("trainer", {}),
        }


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_training_files(root: Path) -> Files:
    """Write all of it into a folder."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "base")
    base = tiny.llama(vocab_size=257, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    base.save_pretrained(root / "base")
    experts = {
        name: tiny.save_expert(root / name, base, seed=i, target_modules=["q_proj", "v_proj"])
        for i, name in enumerate(TEXTS)
    }
    rows = [{"text": f"{text} {i}", "expert": name} for i in range(4) for name, text in TEXTS.items()]
    others = [{"text": f"{text} {i}", "expert": name} for i in range(4, 6) for name, text in TEXTS.items()]
    data, held_out = write_lines(root / "data.jsonl", rows), write_lines(root / "held-out.jsonl", others)
    return Files(root / "base", experts, data, held_out, root)
