"""Streaming: what `generate` writes, token by token, in the colours of the leading experts.

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
    """A generated token.

    Attributes:
        text: its text; a character of several tokens is in the text of the last one.
        leader: the leading expert in the forward that predicted the token; None where no expert had a weight.
        weights: the E final scalings of that forward, at the token before; means over the layers.
    """

    text: str
    leader: str | None
    weights: list[float]


class RoutingStreamer(BaseStreamer):
    """A transformers streamer that shows each token in the colour of its leading expert; made by `stream_routing`.

    It can be passed to several calls of `generate`, one after the other.

    Args:
        experts: the mixture's.
        tokenizer: its tokenizer.
        console: where to show the text.

    Raises:
        RoutingError: `tokenizer` is not a tokenizer.

    Attributes:
        tokens: the tokens of the last text so far.
    """

    def __init__(self, experts: list[str], tokenizer: Any, console: Console) -> None:
        require_tokenizer(tokenizer)
        self.experts, self.tokenizer, self.console = experts, tokenizer, console
        self.tokens: list[WrittenToken] = []
        self.routed = _LastForward()
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
        """Finish the text: print the legend and the shares of the experts."""
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


class _LastForward(RoutingHook):
    """The scalings of the last forward of each thread; a token is predicted at the position before its own."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, Tensor]] = {}

    def forget(self) -> None:
        """Forget this thread's last forward: a new text begins."""
        self._last.pop(threading.get_ident(), None)

    def close(self) -> None:
        """Forget all forwards."""
        self._last.clear()

    def routed(self, output: RouterOutput) -> None:
        if request().scoring or request().drafts:
            return
        cache, final = cache_in(output.inputs), output.final.detach()[0]
        first = 0 if cache is None else held_before(cache, output.inputs, len(final))
        self._last[threading.get_ident()] = first, final

    @property
    def length(self) -> int:
        """The number of tokens of the text that were read."""
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
        """The weights at a position; tokens that were read without scalings have the last ones before them.

        Such tokens occur with `fix_routing(after=n)`.
        """
        first, final = self._latest()
        return final[max(0, min(place - first, len(final) - 1))].float().mean(0).cpu()


@contextmanager
def stream_routing(model: Any, tokenizer: Any, console: Console | None = None) -> Generator[RoutingStreamer]:
    """A streamer for `generate` that shows a text while it is generated, in the colours of the leading experts.

        with stream_routing(model, tokenizer) as streamer:
            model.generate(**inputs, streamer=streamer)

    A token has the routing of the forward that predicted it, at the token before; in a record it has that of the
    forward that reads it. Without colours, an expert's name is printed where it takes the lead.

    Forwards of logits processors, and those in which the model drafts for itself, are not shown.

    Args:
        model: the mixture.
        tokenizer: its tokenizer.
        console: where to show it; None is the standard output. A quiet console shows nothing.

    Yields:
        The streamer, for `generate` inside.

    Raises:
        UnsupportedOperationError: a model without a router.
        RoutingError: a mixture that makes no scalings: its routing is fixed, or its adapters are disabled; or
            `tokenizer` is not a tokenizer.
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
