"""A routing as it happens: what `generate` writes, token by token, in the colour of the expert that leads there.

S: tokens of a forward. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from rich.console import Console
from rich.text import Text
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from loramix.analysis.colours import expert_colours
from loramix.analysis.metrics import confidence_of, leaders_of
from loramix.analysis.record.slots import held_before
from loramix.analysis.record.token_text import IncrementalDecoder, require_tokenizer
from loramix.analysis.show.terminal import led_by, legend, token_text, visible
from loramix.decoding.requests import Request, request
from loramix.errors import RoutingError, UnsupportedOperationError
from loramix.passes.call import cache_in
from loramix.passes.hooks import RouterOutput, RoutingHook, between_graphs
from loramix.passes.state import attach, require_routing


class WrittenToken(NamedTuple):
    """A token that was written.

    Attributes:
        text: its text; that of a character of several tokens stands with the last of them.
        leader: the expert of the largest weight in the forward that predicted it; None where none had any.
        weights: E final scalings of that forward at the token before, mean over the layers.
    """

    text: str
    leader: str | None
    weights: list[float]


class RoutingStreamer(BaseStreamer):
    """transformers' streamer that shows who wrote each token, and keeps it; made by `stream_routing`.

    It shows one text after the other, as often as `generate` is called with it.

    Args:
        experts: the mixture's.
        tokenizer: its tokenizer.
        console: where to show the text.

    Raises:
        RoutingError: what is no tokenizer.

    Attributes:
        tokens: those of the last text that were written so far.
    """

    def __init__(self, experts: list[str], tokenizer: Any, console: Console) -> None:
        require_tokenizer(tokenizer)
        self.experts, self.tokenizer, self.console = experts, tokenizer, console
        self.tokens: list[WrittenToken] = []
        self.routed = _Routed()
        self._paint = expert_colours(experts)
        self._special = set(tokenizer.all_special_ids)
        self._call: Request | None = None
        self._pieces = IncrementalDecoder(tokenizer)
        self._length = 0  # of the text so far
        self._leader: str | None = None  # of what was shown last

    def put(self, value: Tensor) -> None:
        """The prompt first, then what was written.

        Raises:
            UnsupportedOperationError: several texts at once.
            RoutingError: no forward made scalings: the routing is fixed by now, or the block of `stream_routing` left.
        """
        if value.dim() > 1 and len(value) > 1:
            raise UnsupportedOperationError(
                "One text at a time is shown as it is written.",
                received=f"a batch of {len(value)}",
                remedy="generate one text, or record_routing(model) and look at all of them afterwards",
            )
        ids: list[int] = value.flatten().tolist()
        if request() is not self._call:  # a call of `generate` begins with its prompt
            self._call, self.tokens, self._length, self._leader = request(), [], len(ids), None
            self._pieces = IncrementalDecoder(self.tokenizer)
            self.routed.forget()
            prompt = self._pieces.read([token for token in ids if token not in self._special])
            self._print(Text(visible(prompt), style="dim"))
            return
        for token in ids:
            self._length = self._length or self.routed.length  # a prompt of embeddings has no ids
            weights = self.routed.at(self._length - 1)
            piece = "" if token in self._special else self._pieces.step(token)
            self.tokens.append(WrittenToken(piece, leaders_of(self.experts, weights[None])[0], weights.tolist()))
            self._show(self.tokens[-1])
            self._length += 1

    def end(self) -> None:
        """The text is at its end."""
        self._call = None
        rest = self._pieces.flush()
        if rest and self.tokens:
            self.tokens[-1] = self.tokens[-1]._replace(text=self.tokens[-1].text + rest)
            self._show(self.tokens[-1]._replace(text=rest))
        leaders = [token.leader for token in self.tokens]
        self.console.print("\n", legend(self.experts, self.console), sep="\n")
        self.console.print(Text(f"{len(leaders)} tokens, {led_by(leaders)}" if leaders else "no token", style="dim"))

    def _show(self, token: WrittenToken) -> None:
        if token.text:
            sure, named = float(confidence_of(torch.tensor(token.weights))), token.leader != self._leader
            self._print(token_text(token.text, token.leader, sure, self._paint, self.console, named=named))
            self._leader = token.leader

    def _print(self, text: Text) -> None:
        self.console.print(text, end="", soft_wrap=True)


class _Routed(RoutingHook):
    """The last forward of each thread: a token was predicted at the place before its own."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, Tensor]] = {}

    def forget(self) -> None:
        """What came before is of another text."""
        self._last.pop(threading.get_ident(), None)

    def close(self) -> None:
        """Keep nothing."""
        self._last.clear()

    def routed(self, output: RouterOutput) -> None:
        if request().scoring or request().drafts:
            return
        cache, final = cache_in(output.inputs), output.final.detach()[0]
        first = 0 if cache is None else held_before(cache, output.inputs, len(final))
        self._last[threading.get_ident()] = first, final

    @property
    def length(self) -> int:
        """How many tokens of the text have been read."""
        first, final = self._latest()
        return first + len(final)

    def _latest(self) -> tuple[int, Tensor]:
        found = self._last.get(threading.get_ident())
        if found is None:
            raise RoutingError(
                "A token is shown with the scalings of the forward that predicted it.",
                received="a token before any forward made scalings",
                remedy="generate with the mixture itself, inside stream_routing(…), with its adapters on and its "
                "routing not fixed",
            )
        return found

    def at(self, place: int) -> Float[Tensor, " E"]:
        """Of a place in the text: what is read without scalings keeps those before it (`fix_routing(after=n)`)."""
        first, final = self._latest()
        return final[max(0, min(place - first, len(final) - 1))].float().mean(0).cpu()


@contextmanager
def stream_routing(model: Any, tokenizer: Any, console: Console | None = None) -> Generator[RoutingStreamer]:
    """A streamer for `generate` that shows a text while it is written, each token in the colour of its leading expert.

        with stream_routing(model, tokenizer) as streamer:
            model.generate(**inputs, streamer=streamer)

    A token has the routing of the forward that predicted it, at the token before; a record has that of the forward that
    read it. Where there is no colour, the expert's name stands where it takes the lead.

    Forwards that a logits processor runs, or in which the model drafts for itself, are not the text's and not shown.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        console: where to show it; the standard output if None. A quiet one shows nothing.

    Yields:
        The streamer, for `generate` inside.

    Raises:
        UnsupportedOperationError: a model without a router.
        RoutingError: a mixture that makes no scalings: its routing is fixed, or its adapters are disabled; or what is
            no tokenizer.
    """
    shown = Console(highlight=False, force_jupyter=False) if console is None else console
    streamer = RoutingStreamer(list(getattr(model, "expert_names", [])), tokenizer, shown)
    between_graphs(streamer.routed)
    detach = attach(model, streamer.routed)
    try:
        require_routing(model)
        yield streamer
    finally:
        detach()
        streamer.routed.close()
