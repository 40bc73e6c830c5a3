"""The script that trained what ships: it can be started, and draws its windows by weight, each pool in full."""

from __future__ import annotations

import pytest
from tools import train_demo


def test_it_tells_how_to_start_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["train_demo", "--help"])
    with pytest.raises(SystemExit) as stop:
        train_demo.main()
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(stage in out for stage in train_demo.STAGES)


def test_a_pool_is_gone_through_before_it_repeats() -> None:
    pools = {"code": [[1], [2], [3]], "math": [[4]]}
    drawn = train_demo._draw(pools, {"code": 1.0, "math": 1.0}, 24, seed=0).texts
    code = [ids[0] for ids in drawn if ids != [4]]
    assert all(set(code[i : i + 3]) == {1, 2, 3} for i in range(0, len(code) - 2, 3))
    assert [4] in drawn
