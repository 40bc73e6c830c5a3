"""From an encoder's passes to those of the decoder that reads its states (docs/semantics.md §7).

    the model's forward     takes what `encoder_outputs` brings, or what its encoder leaves     `hands_on_encoded`
    the encoder's passes    leave their states and scalings, and return them too                `leave`
    the decoder's passes    each reads the states of the encoder's same pass                    `taken`

So an encoder that ran before, as in `generate`, hands on what it returned: beams are expanded with it.

B, S: batch, tokens of the encoder. H: hidden size. L: adapted layers, 1 where they share their scalings. E: experts.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.errors import RoutingError
from loramix.passes.call import BackboneCall

OUTPUTS, STATES = "encoder_outputs", "encoder_hidden_states"
"""The arguments that bring the encoder's output to a model, and its states to a decoder."""
_HIDDEN, _SCALINGS, _OWNER = "scaling_pass_hidden_state", "scalings", "_loramix_owner"


class Encoded(NamedTuple):
    """What came out of an encoder's two passes.

    Attributes:
        output: (B, S, H), the last hidden states of the mixture pass, which the base model hands to the decoder.
        hidden: (B, S, H), those of the scaling pass.
        scalings: (B, S, L, E), the final scalings of the encoder's tokens.
        owner: the mixture whose encoder it was; None where the output was copied.
    """

    output: Float[Tensor, "B S H"]
    hidden: Float[Tensor, "B S H"]
    scalings: Float[Tensor, "B S #L E"]
    owner: str | None

    @staticmethod
    def of(outputs: Any) -> Encoded | None:
        """What an encoder returned; None where it is not the output of a mixture's encoder."""
        hidden, scalings, owner = (getattr(outputs, name, None) for name in (_HIDDEN, _SCALINGS, _OWNER))
        if hidden is None or scalings is None:
            return None
        return Encoded(outputs.last_hidden_state, hidden, scalings, owner)


class _Left(threading.local):
    def __init__(self) -> None:  # set here, as in `layers/slot.py`
        self.inside = False  # a model's forward; an encoder that runs on its own leaves nothing behind
        self.encoded: Encoded | None = None


_left = _Left()


def hands_on_encoded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a model around an encoder and a decoder, whose passes know of each other only inside it."""
    names = tuple(inspect.signature(forward).parameters)[1:]
    position = names.index(OUTPUTS) if OUTPUTS in names else len(names)

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        outer = _left.inside, _left.encoded
        given = Encoded.of(args[position] if position < len(args) else kwargs.get(OUTPUTS))
        _left.inside, _left.encoded = True, given or _left.encoded
        try:
            return forward(self, *args, **kwargs)
        finally:
            _left.inside, _left.encoded = outer

    return run


def leave(out: Any, hidden: Tensor, scalings: Tensor, owner: str) -> None:
    """Leave what an encoder's passes made for the decoder, and add it to the encoder's output.

    Args:
        out: the output of the mixture pass, which is changed.
        hidden: the last hidden states of the scaling pass.
        scalings: the final scalings.
        owner: the mixture.
    """
    if _left.inside:
        _left.encoded = Encoded(out.last_hidden_state, hidden, scalings, owner)
    out[_HIDDEN], out[_SCALINGS] = hidden, scalings
    setattr(out, _OWNER, owner)  # no tensor, so none of its items


def taken(call: BackboneCall, owner: str) -> Encoded:
    """What the encoder left whose states this call of the decoder reads.

    Args:
        call: the call.
        owner: the mixture.

    Raises:
        RoutingError: none, or other states, or those of another mixture.
    """
    encoded, states = _left.encoded, call.arguments.get(STATES)
    if encoded is not None and encoded.owner not in (None, owner):
        encoded = None
    if encoded is not None and states is not encoded.output and not torch.compiler.is_compiling():  # there: new objects
        encoded = _beside(states, encoded)
    if encoded is None:
        raise RoutingError(
            "A mixture's decoder reads what the mixture's encoder returned in both of its passes.",
            received=f"a {type(call.model).__name__} with no {STATES}"
            if states is None
            else f"{STATES} of {tuple(states.shape)} without the scaling pass of this mixture's encoder",
            remedy=f"call the whole model; as {OUTPUTS}= pass what model.get_encoder()(…) returned, unchanged",
        )
    return encoded


def _beside(states: Tensor | None, encoded: Encoded) -> Encoded | None:
    """The same where these states are: accelerate copies them to the decoder's device. None if they are others."""
    if states is None or states.shape != encoded.output.shape or not torch.equal(states, encoded.output.to(states)):
        return None
    return encoded._replace(hidden=encoded.hidden.to(states), scalings=encoded.scalings.to(states.device))
