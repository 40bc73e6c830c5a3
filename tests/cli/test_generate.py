"""`loramix generate`: what it prints is what the library generates."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
import torch
from transformers import AutoTokenizer

from loramix import AutoPeftModelForCausalLM
from loramix.evaluation.passages import pad
from loramix.model.prompt_choice import Responses, Similarity


@pytest.fixture
def written(folders):
    """The library's own greedy continuation of `text`."""
    model = AutoPeftModelForCausalLM.from_pretrained(folders.mixture).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders.base)

    def write(text: str, tokens: int) -> str:
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    return write


def test_the_text_is_the_librarys(loramix, folders, written) -> None:
    done = loramix("generate", folders.mixture, "--prompt", "2 + 2", "--max-new-tokens", 6)
    assert (done.code, done.err) == (0, "")
    assert done.out == written("2 + 2", 6) + "\n"


def test_json_is_one_document_with_the_same_text(loramix, folders, written) -> None:
    document = json.loads(
        loramix("generate", folders.mixture, "--prompt", "2 + 2", "--max-new-tokens", 6, "--json").out
    )
    assert document["text"] == written("2 + 2", 6)
    assert (document["prompt_tokens"], document["new_tokens"]) == (5, 6)
    assert (document["prompt"], document["base"]) == ("2 + 2", str(folders.base))
    assert "tokens" not in document


def test_the_prompt_may_come_from_stdin(loramix, folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines"))
    document = json.loads(loramix("generate", folders.mixture, "--prompt", "-", "--max-new-tokens", 1, "--json").out)
    assert document["prompt"] == "two\nlines"


def test_a_seed_repeats_the_draw(loramix, folders) -> None:
    def draw(seed: int) -> str:
        words = ("--prompt", "x", "--max-new-tokens", 12, "--do-sample", "--temperature", 2, "--seed", seed, "--json")
        return json.loads(loramix("generate", folders.mixture, *words).out)["text"]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_show_experts_as_json_gives_the_scalings_that_wrote_each_token(loramix, folders) -> None:
    words = ("--prompt", "ab", "--max-new-tokens", 3, "--show-experts", "--json")
    document = json.loads(loramix("generate", folders.mixture, *words).out)
    model = AutoPeftModelForCausalLM.from_pretrained(folders.mixture).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    ids = tokenizer("ab", return_tensors="pt")
    whole = model.generate(**ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model(whole)
    expected = model.get_latest_scalings()[0, 1:-1].mean(1)
    torch.testing.assert_close(torch.tensor([token["weights"] for token in document["tokens"]]), expected)
    leaders = [document["experts"][row.index(max(row))] for row in expected.tolist()]
    assert [token["leader"] for token in document["tokens"]] == leaders


def test_show_experts_without_colour_marks_the_leaders(loramix, folders) -> None:
    done = loramix("generate", folders.mixture, "--prompt", "ab", "--max-new-tokens", 3, "--show-experts")
    assert done.code == 0
    assert re.search(r"ab⟨(math|code)⟩", done.out)
    assert "\x1b[" not in done.out


def test_a_single_expert_has_no_routing_to_show(loramix, folders) -> None:
    done = loramix("generate", folders.experts["math"], "--prompt", "ab", "--show-experts", "--max-new-tokens", 1)
    assert done.code == 1
    assert done.err.startswith("UnsupportedOperationError: ")


@pytest.mark.parametrize("by", ["mean", "responses", "examples"])
def test_weights_are_chosen_once_by_the_prompt(by: str, loramix, folders, tmp_path) -> None:
    texts = {"math": ["2 + 2 = 4", "1"], "code": ["def f(x):"]}
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(texts))
    words = ("generate", folders.mixture, "--prompt", "2 + 2", "--max-new-tokens", 6, "--json")
    document = json.loads(loramix(*words, "--fix-routing", file if by == "examples" else by).out)
    model = AutoPeftModelForCausalLM.from_pretrained(folders.mixture).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders.base)
    ids = tokenizer("2 + 2", return_tensors="pt")
    if by == "mean":
        model.fix_routing(prompt=ids)
    elif by == "responses":
        model.fix_routing(prompt=ids, by=Responses())
    else:
        padded = {name: pad([tokenizer(text)["input_ids"] for text in each]) for name, each in texts.items()}
        examples = {name: {"input_ids": each, "attention_mask": real} for name, (each, real) in padded.items()}
        model.fix_routing(prompt=ids, by=Similarity.to(model, examples))
    expected = model.generate(**ids, max_new_tokens=6, do_sample=False)
    assert document["text"] == tokenizer.decode(expected[0, 5:], skip_special_tokens=True)
    found = torch.tensor([document["weights"][name] for name in ("math", "code")])
    torch.testing.assert_close(found, model.fixed_routing.mean(0))


def test_what_fixes_no_routing_is_told(loramix, folders, tmp_path) -> None:
    words = ("generate", folders.mixture, "--prompt", "x", "--max-new-tokens", 1)
    assert loramix(*words, "--fix-routing", "mean", "--show-experts").code == 2
    done = loramix(*words, "--fix-routing", tmp_path / "nowhere.json")
    assert (done.code, done.err.partition(":")[0]) == (1, "ConfigurationError")
    done = loramix("generate", folders.experts["math"], "--prompt", "x", "--fix-routing", "mean")
    assert (done.code, done.err.partition(":")[0]) == (1, "ConfigurationError")
    done = loramix("generate", folders.mixture, "--prompt", "", "--fix-routing", "responses")
    assert done.err.startswith("ConfigurationError: A prompt has at least one token.")


def test_base_may_be_named(loramix, folders, tmp_path) -> None:
    moved = shutil.copytree(folders.base, tmp_path / "moved")
    words = ("generate", folders.mixture, "--prompt", "x", "--max-new-tokens", 1, "--json")
    assert json.loads(loramix(*words, "--base", moved).out)["base"] == str(moved)


def test_a_base_that_is_not_there_is_told(loramix, folders, tmp_path) -> None:
    done = loramix("generate", folders.mixture, "--prompt", "x", "--base", tmp_path / "nowhere")
    assert (done.code, done.out) == (1, "")
    assert "--base" in done.err


def test_a_mixture_that_names_no_base_is_told(loramix, folders, tmp_path) -> None:
    config = shutil.copytree(folders.mixture, tmp_path / "nameless") / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    done = loramix("generate", config.parent, "--prompt", "x")
    assert done.code == 1
    assert done.err.startswith("ConfigurationError: ")


def test_an_empty_prompt_is_told(loramix, folders) -> None:
    done = loramix("generate", folders.mixture, "--prompt", "")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ConfigurationError: A prompt has at least one token.")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("model.safetensors", ""),
        ("model.safetensors", "truncated"),
    ],
)
def test_a_base_that_cannot_be_read_is_told_in_one_line_each(
    file: str, content: str, loramix, folders, tmp_path
) -> None:
    broken = shutil.copytree(folders.base, tmp_path / "broken")
    (broken / file).write_text(content)
    done = loramix("generate", folders.mixture, "--prompt", "x", "--base", broken)
    assert (done.code, done.out) == (1, "")
    assert re.match(r"(CheckpointNotFound|CorruptCheckpoint)Error: The ", done.err)
    assert [line.split(":")[0].strip() for line in done.err.splitlines()[1:]] == ["received", "remedy"]
    assert str(broken) in done.err


def test_a_base_of_another_size_than_its_weights_is_told(loramix, folders, tmp_path) -> None:
    config = shutil.copytree(folders.base, tmp_path / "wrong") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 300}))
    done = loramix("generate", folders.mixture, "--prompt", "x", "--base", config.parent)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("CorruptCheckpointError: ")


def test_a_folder_named_demo_goes_before_the_mixture_that_ships(
    loramix, folders, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders.mixture, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    words = ("generate", "demo", "--prompt", "x", "--max-new-tokens", 1, "--json")
    assert json.loads(loramix(*words).out)["base"] == str(folders.base)
    assert json.loads(loramix("info", "demo", "--json").out)["base_model"] == str(folders.base)


@pytest.mark.parametrize("device", ["abacus", "cuda:999", "meta"])
def test_a_device_that_cannot_be_used_is_told(device: str, loramix, folders) -> None:
    done = loramix("generate", folders.mixture, "--prompt", "x", "--device", device)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("ConfigurationError: A device is one that torch can use")
    assert f"received: '{device}'" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "demo"),
        ("generate", "--prompt", "x"),
        ("generate", "demo", "--prompt", "x", "--seed", "1"),
        ("generate", "demo", "--prompt", "x", "--max-new-tokens", "0"),
        ("generate", "demo", "--prompt", "x", "--max-new-tokens", "1" + 20 * "0"),
        ("generate", "demo", "--prompt", "x", "--do-sample", "--seed", "4294967296"),
        ("demo", "--seed", "4294967296"),
        ("generate", "demo", "--prompt", "x", "--colour"),
        ("unknown",),
        (),
    ],
)
def test_wrong_usage_is_exit_code_2(words: tuple[str, ...], loramix) -> None:
    assert loramix(*words).code == 2
