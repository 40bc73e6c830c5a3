"""The forwards of one generation over its row store: the scaling pass, the mixture pass, or both at once.

B: batch. k: drafts. H: hidden size. L: adapted layers. E: experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loramix._compat import CACHE
from loramix.decoding.row_cache import Rows, Write
from loramix.decoding.state import DecodingState, Step
from loramix.decoding.window import Window
from loramix.layers.routing import Routing, TensorRouting
from loramix.layers.slot import ObservedPass, override
from loramix.passes.state import MixtureState, RoutedPass


class Forwards:
    """The forwards that strategies run.

    Args:
        model: the mixture.
        mixture: its state.
        state: the generation's; its report counts every forward.
    """

    def __init__(self, model: Any, mixture: MixtureState, state: DecodingState) -> None:
        self.model, self.mixture, self.state = model, mixture, state

    def scale(self, ids: Tensor, positions: Tensor, slot: int) -> Float[Tensor, "B tokens H"]:
        """The scaling pass's hidden states.

        Args:
            ids: (B, tokens), what the pass reads.
            positions: of each.
            slot: of the first token, in the store.
        """
        rows = slice(0, self.state.batch)
        return self._run(self.model.base_model, ids, positions, (rows, slot))[0]

    def scale_and_draft(
        self, step: Step, ids: Tensor, positions: Tensor, slot: int, rows: Rows | None = None
    ) -> tuple[Float[Tensor, "rows 1 H"], Int[Tensor, " rows"]]:
        """The scaling pass's hidden states at one token of each row, and its draft of the token after it.

        Args:
            step: the token to compute next.
            ids: (rows, 1).
            positions: of each.
            slot: theirs.
            rows: the rows of the batch to run; None runs all.
        """
        rows = slice(0, self.state.batch) if rows is None else rows
        hidden, out = self._run(step.call, ids, positions, (rows, slot))
        return hidden, out.logits[:, -1].argmax(-1)

    def mix(self, step: Step, drafts: Int[Tensor, "B k"], routing: Routing | None) -> Any:
        """The model's output of the mixture pass for a token and k drafts after it."""
        rows = slice(self.state.batch, 2 * self.state.batch)
        return self._run(step.call, *step.followed_by(drafts), (rows, self.state.length), routing=routing)[1]

    def scale_and_mix(
        self, step: Step, draft: Int[Tensor, " B"], routing: TensorRouting
    ) -> tuple[Float[Tensor, "B 1 H"], Int[Tensor, " B"], Any]:
        """Both passes in one forward: the scaling pass reads a draft of the next token, the mixture pass the token.

        Returns:
            The scaling pass's hidden states at the draft, its draft of the token after that, and the model's output of
            the mixture pass.
        """
        batch, slot = self.state.batch, self.state.length
        both = torch.cat([torch.full_like(routing.scalings, self.mixture.config.scaling_pass_value), routing.scalings])
        hidden, out = self._run(
            step.call,
            torch.cat([draft[:, None], step.ids]),
            torch.cat([step.positions + 1, step.positions]),
            (slice(0, batch), slot + 1),
            (slice(batch, 2 * batch), slot),
            routing=self.mixture.routing(both),
        )
        logits, out.logits = out.logits[:batch], out.logits[batch:]
        return hidden[:batch], logits[:, -1].argmax(-1), out

    def route(self, hidden: Float[Tensor, "B tokens H"], inputs: Mapping[str, Any]) -> RoutedPass:
        """The scalings of the mixture pass. If the routing is to be fixed to their mean, they are added to it."""
        made = self.mixture.route(hidden, inputs, False)
        if self.state.fixing is not None:
            mean = self.state.fixing.add(made.routing.scalings)
            if mean is not None:
                self.state.fixed = self.mixture.routing(mean)
        return made

    def take(self, window: Window) -> Any:
        """The model's output for the next token of a window; an exhausted window is dropped."""
        out, scalings = window.pop()
        self.mixture.set_latest(scalings)
        self.state.window = None if window.is_exhausted else window
        return out

    @property
    def plain_head(self) -> nn.Linear | None:
        """The language model's head; None if it is more than one matrix product."""
        head = self.model.get_output_embeddings()
        return head if type(head) is nn.Linear else None

    def _run(
        self,
        call: Callable[..., Any],
        ids: Tensor,
        positions: Tensor,
        *writes: Write,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Any]:
        """One forward over some rows of the store: the last hidden states, and what `call` returned.

        Args:
            call: the model's own forward, or the backbone's.
            ids: (rows, tokens).
            positions: of each.
            *writes: rows of the store, and the slot of their first token.
            routing: the scaling pass's if None.
        """
        store, report = self.state.store, self.state.report
        store.write(self.state.length, ids.shape[1], *writes)
        observed = ObservedPass(routing or self.mixture.scaling_pass())
        with override(self.mixture, lambda: observed):
            out = call(
                input_ids=ids,
                position_ids=positions,
                attention_mask=store.masks(self.model.dtype, ids.device),
                use_cache=True,
                return_dict=True,
                **{CACHE: store},
            )
        report.forwards += 1
        report.row_forwards += ids.numel()
        assert observed.hidden is not None
        return observed.hidden, out
