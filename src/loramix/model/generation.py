"""`generate` in lockstep: transformers' own loop, with a model that may read a token of both passes at once."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from loramix.decoding.eligibility import why_not_this_generation
from loramix.decoding.lockstep import Lockstep, LockstepReport, Wanted, as_wanted
from loramix.decoding.requests import (
    WatchedCriteria,
    WatchedProcessors,
    asked,
    decoding,
    paused,
    request,
    session_of,
    tell,
    wanted_by,
)
from loramix.errors import UnsupportedOperationError
from loramix.model.peft_methods import PeftMethods


class LockstepMethods(PeftMethods):
    """Generation with both passes in one forward per token, where that is exact and pays."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = None if args else session_of(self._loramix)
        if session is not None:
            with paused():
                out = session.step(super().__call__, kwargs)  # pyright: ignore
            if out is not None:
                return out
        return super().__call__(*args, **kwargs)  # pyright: ignore

    def generate(self, *args: Any, lockstep: Wanted = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with both passes in one forward per token where that is exact and pays.

        Args:
            *args: as for the base model.
            lockstep: True: the scaling pass runs one token ahead in the same forward, wherever that is exact; a number
                k > 1: it runs k tokens ahead, before one forward of the mixture pass over all of them; "lookup": where
                the text repeats itself its own words are the drafts, elsewhere as True; False: the passes run one after
                the other; None: what `generation_config.lockstep` says, else each way while it is measured to be the
                cheapest. The text is the same.
            **kwargs: as for the base model.

        Returns:
            What the base model's `generate` returns; `lockstep_report` then says how it went.

        Raises:
            ConfigurationError: `lockstep` is none of these.
        """
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        wanted = wanted_by(given or cast(Any, self).generation_config, as_wanted(lockstep))
        with asked(wanted, self._loramix) as call:
            try:
                out = super().generate(*args, **kwargs)  # pyright: ignore
            finally:
                report = call.report or LockstepReport(reason="only greedy decoding and sampling can")
                self._loramix.report = report
        after = self._loramix.fixed_after
        if report.reason is not None and (wanted or after) and self._loramix.single_pass() is None:
            tell(report.reason, f"lockstep={wanted!r}" if wanted else f"fix_routing(after={after})")
        return out

    @property
    def lockstep_report(self) -> LockstepReport | None:
        """How the last `generate` decoded: forwards per token, and the share of right drafts; None before the first."""
        return self._loramix.report

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching (`generate_batch`), where the routing is fixed: it pages one cache alone.

        Raises:
            UnsupportedOperationError: a mixture that routes each token, whose two passes need a cache each.
        """
        if self._loramix.single_pass() is None:
            raise UnsupportedOperationError(
                "Continuous batching pages one cache, and a mixture that routes each token has two.",
                received="generate_batch, or a continuous batching manager, on such a mixture",
                remedy="call generate with a left-padded batch, or fix the routing first: fix_routing(…)",
            )
        return super().init_continuous_batching(*args, **kwargs)  # pyright: ignore

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return WatchedProcessors(super()._get_logits_processor(*args, **kwargs), request())  # pyright: ignore

    def _sample(self, input_ids: Tensor, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        kwargs["stopping_criteria"] = WatchedCriteria(kwargs["stopping_criteria"], request())
        call, state, cache = super()._sample, self._loramix, kwargs.get("past_key_values")  # pyright: ignore
        wanted = wanted_by(generation_config, request().wanted)
        reason = why_not_this_generation(self, state, wanted, generation_config, cache)
        if reason is not None:
            request().report = LockstepReport(reason=reason)
            with paused():
                return call(input_ids, *args, generation_config=generation_config, **kwargs)
        seen = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        seen = seen or state.hooks or state.log.enabled
        ends = None if seen else getattr(generation_config, "_eos_token_tensor", None)
        longest = getattr(generation_config, "max_length", None)
        new = None if longest is None else longest - input_ids.shape[1]
        session = Lockstep(self, state, wanted, cache, input_ids, new=new, ends=ends)
        request().report = session.report
        with decoding(session):
            return call(input_ids, *args, generation_config=generation_config, **kwargs)
