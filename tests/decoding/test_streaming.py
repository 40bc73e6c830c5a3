"""Text instead of tokens: a streamer read from another thread, and the pipeline."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from support.tiny import VOCABULARY

PROMPT = "w5 w17 w33 w8 w21"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each token of the tiny models."""
    words = {"<pad>": 0, "<s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    inner = Tokenizer(WordLevel(words, unk_token="<s>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def test_a_streamer_gets_the_same_text_in_pieces(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    whole = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, 5:]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={**inputs, "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    )
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces).split() == tokenizer.decode(whole).split()
    assert len(pieces) > 1


@pytest.mark.parametrize("rows", [1, 2])
def test_the_pipeline_generates_the_same_text(model: Any, tokenizer: Any, rows: int) -> None:
    prompts = [PROMPT, "w40 w41"][:rows]
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    texts = [answer[0]["generated_text"].split() for answer in pipe(prompts, batch_size=rows, **settings)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    width = inputs["input_ids"].shape[1]
    assert texts == [tokenizer.decode(row[width:], skip_special_tokens=True).split() for row in expected]
    assert texts[0] != texts[-1] or rows == 1


def test_a_streamer_sees_the_prompt_first(of_llama: Any, tokenizer: Any) -> None:
    seen: list[torch.Tensor] = []

    class Collector:
        def put(self, value: torch.Tensor) -> None:
            seen.append(value.flatten())

        def end(self) -> None:
            seen.append(torch.tensor([-1]))

    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    found = of_llama.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=Collector())[0]
    assert torch.equal(torch.cat(seen), torch.cat([found, torch.tensor([-1])]))
