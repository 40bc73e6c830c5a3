"""`loramix edit`: the experts of a saved mixture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loramix.formats import load_mixture
from support.checkpoints import make_expert, make_mixture, same_expert


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of math and code whose layers share their scalings, and another expert, as folders."""
    from loramix.formats import save_adapter, save_mixture

    root = tmp_path_factory.mktemp("edit")
    save_mixture(root / "mixture", *make_mixture(base_model_name_or_path="user/base"))
    save_adapter(root / "physics", make_expert("physics", seed=7, r=3))
    return root


def test_all_edits_at_once(loramix, shared: Path, tmp_path: Path) -> None:
    (shared / "mixture" / "notes.txt").write_text("mine")
    words = ["--remove", "code", "--rename", "math=sums", "--add", f"physics={shared}/physics"]
    done = loramix("edit", shared / "mixture", tmp_path / "new", *words, "--order", "physics, sums")
    assert (done.code, done.err) == (0, "")
    assert "experts math, code -> physics, sums" in done.out
    assert "note: physics is cold" in done.out
    assert "note: notes.txt is not copied." in done.out
    before, after = load_mixture(shared / "mixture"), load_mixture(tmp_path / "new")
    assert list(after.config.adapters) == ["physics", "sums"]
    assert torch.equal(after.router["layers.0.weight"][1], before.router["layers.0.weight"][0])
    assert same_expert(after.experts[0], make_expert("physics", seed=7, r=3))
    assert loramix("info", tmp_path / "new").code == 0


def test_another_expert_in_its_place(loramix, shared: Path, tmp_path: Path) -> None:
    done = loramix("edit", shared / "mixture", tmp_path / "new", "--replace", f"code={shared}/physics", "--json")
    document = json.loads(done.out)
    assert (document["before"], document["experts"]) == (["math", "code"], ["math", "code"])
    before, after = load_mixture(shared / "mixture"), load_mixture(tmp_path / "new")
    assert after.experts[1].rank("model.layers.0.q") == 3
    assert all(torch.equal(after.router[name], tensor) for name, tensor in before.router.items())


def test_the_mixture_that_ships_with_one_expert_more_writes_the_same_text(loramix, tmp_path: Path) -> None:
    from loramix import demo

    name, path = next(iter(demo.experts().items()))
    assert loramix("edit", "demo", tmp_path / "new", "--add", f"new={path}").code == 0
    base = Path(demo.mixture()).parent / "base"
    words = ["--prompt", "def f(", "--max-new-tokens", "8"]
    one = loramix("generate", "demo", *words)
    other = loramix("generate", tmp_path / "new", "--base", base, *words)
    assert name in load_mixture(tmp_path / "new").config.adapters
    assert (other.code, other.out) == (0, one.out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "received: none of these"),
        (["--remove", "math", "--remove", "code"], "at least one expert"),
        (["--remove", "poems"], "'poems', and experts 'math', 'code'"),
        (["--rename", "math=code"], "'code' and 'code'"),
        (["--order", "math"], "name them all"),
        (["--add", "new=./nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_edited_writes_nothing(
    words: list[str], said: str, loramix, shared: Path, tmp_path: Path
) -> None:
    done = loramix("edit", shared / "mixture", tmp_path / "new", *words)
    assert done.code == 1
    assert said in " ".join(done.err.split())
    assert not (tmp_path / "new").exists()


def test_wrong_words(loramix, shared: Path, tmp_path: Path) -> None:
    for words in (["--add", "physics"], ["--rename", "math"], ["--replace", "=x"], ["--add", "a=x", "--add", "a=y"]):
        done = loramix("edit", shared / "mixture", tmp_path / "new", *words)
        assert (done.code, words[0] in done.err) == (2, True)


def test_never_in_place(loramix, shared: Path) -> None:
    done = loramix("edit", shared / "mixture", shared / "mixture", "--remove", "math")
    assert done.code == 1
    assert "new or empty folder" in done.err


def test_layers_that_go_with_an_expert_are_named(loramix, folders, tmp_path: Path) -> None:
    done = loramix("edit", folders.mixture, tmp_path / "new", "--remove", "math")  # alone on v_proj, and layerwise
    assert done.code == 1
    assert "v_proj" in done.err
