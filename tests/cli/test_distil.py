"""`loramix distil` on the demo mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loramix import PeftModel, demo
from loramix.cli.app import main
from loramix.demo import corpus


def test_a_mixture_that_needs_one_pass_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [text for domain in demo.DOMAINS for text in corpus.train_text(domain, 3_000)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    place = str(tmp_path / "one-pass")
    words = ["distil", "demo", "--data", str(tmp_path / "train.jsonl"), "--output", place, "--json"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--window", "64", "--limit", "12", "--steps", "2"])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mixture"] == place
    assert told["divergence"] <= told["start"]
    loaded: Any = PeftModel.from_pretrained(demo.base(), place)
    assert loaded.router.kind == "linear"
    with pytest.raises(SystemExit) as left:
        main(["distil", place, "--base", str(tmp_path), "--data", "nowhere.jsonl", "--output", str(tmp_path / "two")])
    assert left.value.code == 1
