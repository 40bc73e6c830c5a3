"""Text that is shown while it is written has the routing of the forwards that predicted it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.testing import assert_close

from loramix import RoutingError, UnsupportedOperationError
from loramix.analysis import WrittenToken, expert_colours, stream_routing
from loramix.analysis.record.token_text import IncrementalDecoder
from loramix.analysis.show.live import RoutingStreamer
from loramix.passes.state import state_of
from support.byte_tokenizer import byte_tokenizer
from support.tiny import tokens
from support.versions import needs_transformers

Direct = Callable[[Any, Any], Tensor]
WAYS: dict[str, dict[str, Any]] = {
    "two passes": {"lockstep": False},
    "lockstep": {"lockstep": True},
    "several drafts": {"lockstep": 5},
    "by itself": {},
    "without a cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "guidance": {"guidance_scale": 1.5},
    "guidance without a cache": {"guidance_scale": 1.5, "use_cache": False},
    "guidance in lockstep": {"guidance_scale": 1.5, "lockstep": True, "negative_prompt_ids": torch.tensor([[9, 8]])},
}

NEEDS = {
    "prompt lookup": needs_transformers(5, 18, "prompt lookup needs an end token"),
    "early exit": needs_transformers(5, 8, "a model that exits early to draft for itself stops with a TypeError"),
}


def console(**options: Any) -> Console:
    return Console(file=io.StringIO(), highlight=False, width=40, **options)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("way", [pytest.param(way, marks=NEEDS.get(way, ())) for way in WAYS])
def test_each_token_has_the_routing_of_the_forward_that_predicted_it(routed: Any, direct: Direct, way: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    plain = console()
    with stream_routing(routed, byte_tokenizer(), plain) as streamer:
        out = routed.generate(ids, max_new_tokens=14, do_sample=False, streamer=streamer, **WAYS[way])
    assert state_of(routed).hooks == ()
    expected = direct(routed, out[0])[9:-1].mean(1)
    assert_close(torch.tensor([token.weights for token in streamer.tokens]), expected, atol=1e-5, rtol=1e-4)
    leaders = [routed.expert_names[i] for i in expected.argmax(-1).tolist()]
    assert [token.leader for token in streamer.tokens] == leaders
    assert f"14 tokens, led by {max(set(leaders), key=leaders.count)}" in printed(plain).replace("\n", " ")


@pytest.mark.parametrize("way", ["two passes", "lockstep", "by itself", "without a cache"])
def test_a_prompt_of_embeddings_counts_as_much_as_one_of_ids(routed: Any, direct: Direct, way: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    embedded = routed.get_input_embeddings()(ids).detach()
    with stream_routing(routed, byte_tokenizer(), console(quiet=True)) as streamer:
        out = routed.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False, streamer=streamer, **WAYS[way])
    assert len(streamer.tokens) == out.shape[1] == 6
    expected = direct(routed, torch.cat([ids, out], 1)[0])[9:-1].mean(1)
    assert_close(torch.tensor([token.weights for token in streamer.tokens]), expected, atol=1e-5, rtol=1e-4)


def test_it_shows_one_text_after_the_other_also_after_one_that_broke_off(routed: Any, direct: Direct) -> None:
    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with stream_routing(routed, byte_tokenizer(), console(quiet=True)) as streamer:
        routed.generate(tokens(1, 5), max_new_tokens=5, do_sample=False, streamer=streamer)
        with pytest.raises(KeyboardInterrupt):
            routed.generate(tokens(1, 3), max_new_tokens=5, streamer=streamer, logits_processor=[stop])
        out = routed.generate(tokens(1, 7, seed=3), max_new_tokens=4, do_sample=False, streamer=streamer)
    expected = direct(routed, out[0])[6:-1].mean(1)
    assert_close(torch.tensor([token.weights for token in streamer.tokens]), expected, atol=1e-5, rtol=1e-4)


def test_a_token_without_a_forward_that_made_scalings_is_told(routed: Any) -> None:
    with stream_routing(routed, byte_tokenizer(), console(quiet=True)) as streamer:
        routed.generate(tokens(1), max_new_tokens=3, do_sample=False, streamer=streamer)
        with routed.disable_adapter(), pytest.raises(RoutingError, match="the forward that predicted it"):
            routed.generate(tokens(1), max_new_tokens=3, do_sample=False, streamer=streamer)
        routed.generate(tokens(1), max_new_tokens=3, do_sample=False, streamer=streamer)
    assert len(streamer.tokens) == 3
    with pytest.raises(RoutingError, match="the forward that predicted it"):
        routed.generate(tokens(1), max_new_tokens=3, do_sample=False, streamer=streamer)


def test_the_first_word_keeps_its_space_and_a_character_its_first_half() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "▁Hello", "▁world", *(f"<0x{byte:02X}>" for byte in "漢".encode())]
    inside = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inside.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside, bos_token="<s>")
    for prompt, written, text in (([0, 1], [2], [" world"]), ([0, 1, 3, 4], [5, 2], ["漢", " world"])):
        plain = console()
        streamer = RoutingStreamer(["math"], tokenizer, plain)
        streamer.routed.at = lambda place: torch.ones(1)
        for ids in (prompt, *([token] for token in written)):
            streamer.put(torch.tensor(ids))
        streamer.end()
        assert [token.text for token in streamer.tokens] == text
        assert printed(plain).startswith("Hello⟨math⟩" + "".join(text))


def test_bytes_that_begin_no_character_are_the_prompts() -> None:
    pieces = IncrementalDecoder(byte_tokenizer())
    whole = byte_tokenizer()("漢", add_special_tokens=False)["input_ids"]
    assert pieces.read([whole[1]] * 5) == "�" * 5
    assert [pieces.step(token) for token in whole] == ["", "", "漢"]


def test_no_expert_leads_where_no_expert_has_a_weight() -> None:
    plain = console()
    streamer = RoutingStreamer(["math", "code"], byte_tokenizer(), plain)
    streamer.put(torch.tensor([1]))
    for token in byte_tokenizer()("xy", add_special_tokens=False)["input_ids"]:
        streamer.routed.at = lambda place, token=token: torch.zeros(2)
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert [token.leader for token in streamer.tokens] == [None, None]
    assert "xy\n" in printed(plain)
    assert "2 tokens, led by no expert 100%" in printed(plain)


def test_the_text_is_the_tokens_text_and_names_stand_where_the_lead_changes() -> None:
    tokenizer, plain = byte_tokenizer(), console()
    streamer = RoutingStreamer(["math", "code"], tokenizer, plain)
    streamer.put(torch.tensor([tokenizer("ab", add_special_tokens=False)["input_ids"]]))
    written = tokenizer("x\x1b é 漢", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    for i, token in enumerate(written):
        streamer.routed.at = lambda place, i=i: torch.tensor([0.9, 0.1] if i < 4 else [0.2, 0.8])
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert [token.text for token in streamer.tokens] == ["x", "\x1b", " ", "", "é", " ", "", "", "漢", ""]
    assert printed(plain).startswith("ab⟨math⟩x␛ ⟨code⟩é 漢\n")
    assert "10 tokens, led by code 60%, math 40%" in printed(plain)


def test_a_text_that_ends_within_a_character_shows_what_there_is() -> None:
    tokenizer, plain = byte_tokenizer(), console()
    streamer = RoutingStreamer(["math"], tokenizer, plain)
    streamer.routed.at = lambda place: torch.ones(1)
    streamer.put(torch.tensor([1]))
    for token in tokenizer("x漢", add_special_tokens=False)["input_ids"][:3]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert [token.text for token in streamer.tokens] == ["x", "", "�"]
    assert "x�\n" in printed(plain)


def test_colours_are_the_experts_and_a_quiet_console_shows_nothing(routed: Any) -> None:
    coloured, quiet = console(force_terminal=True, color_system="truecolor"), console(quiet=True)
    for shown in (coloured, quiet):
        with stream_routing(routed, byte_tokenizer(), shown) as streamer:
            routed.generate(tokens(1), max_new_tokens=5, do_sample=False, streamer=streamer)
    paint = expert_colours(routed.expert_names)
    for leader in {token.leader for token in streamer.tokens if token.text}:
        red, green, blue = (int(paint[leader][i : i + 2], 16) for i in (1, 3, 5))
        assert f"38;2;{red};{green};{blue}m" in printed(coloured)
    assert printed(quiet) == ""
    assert all(isinstance(token, WrittenToken) for token in streamer.tokens)


def test_text_is_there_while_it_is_written(routed: Any) -> None:
    plain, lengths = console(), list[int]()

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        lengths.append(len(printed(plain)))
        return scores

    with stream_routing(routed, byte_tokenizer(), plain) as streamer:
        routed.generate(tokens(1), max_new_tokens=8, do_sample=False, streamer=streamer, logits_processor=[look])
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_routing_that_is_fixed_after_some_tokens_keeps_what_it_had(routed: Any, direct: Direct) -> None:
    routed.fix_routing(after=3)
    try:
        with stream_routing(routed, byte_tokenizer(), console(quiet=True)) as streamer:
            out = routed.generate(tokens(1), max_new_tokens=8, do_sample=False, streamer=streamer)
    finally:
        routed.unfix_routing()
    expected = direct(routed, out[0, : 9 + 3])[8:].mean(1)
    expected = torch.cat([expected, expected[-1:].expand(8 - len(expected), -1)])
    assert_close(torch.tensor([token.weights for token in streamer.tokens]), expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_shown_is_told(routed: Any) -> None:
    with (
        pytest.raises(UnsupportedOperationError, match="a batch of 2"),
        stream_routing(routed, byte_tokenizer(), console()) as streamer,
    ):
        streamer.put(tokens(2))
    with (
        pytest.raises(UnsupportedOperationError, match="Only a mixture"),
        stream_routing(torch.nn.Linear(2, 2), byte_tokenizer()),
    ):
        pass
    with pytest.raises(RoutingError), routed.disable_adapter(), stream_routing(routed, byte_tokenizer()):
        pass
    assert state_of(routed).hooks == ()
