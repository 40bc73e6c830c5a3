"""`generate` with fewer forwards: transformers' own loop, in which a session computes tokens in place of the model."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from loramix._compat import CACHE, generation_cache
from loramix.decoding.choice import Automatic, Choice, LockstepArgument, parse
from loramix.decoding.eligibility import why_not_this_generation
from loramix.decoding.report import LockstepReport
from loramix.decoding.requests import (
    RequestCriteria,
    RequestProcessors,
    decoding,
    new_request,
    no_session,
    request,
    session_of,
)
from loramix.decoding.session import Session
from loramix.decoding.strategies import Sequential
from loramix.errors import UnsupportedOperationError
from loramix.model.peft_methods import MixtureMethods
from loramix.passes.call import cache_in


class LockstepMethods(MixtureMethods):
    """Generation with verified drafts: the same tokens in fewer forwards."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = None if args else session_of(self._loramix)
        if session is not None:
            with no_session():
                out = session.step(super().__call__, kwargs)  # pyright: ignore
            if out is not None:
                return out
        return super().__call__(*args, **kwargs)  # pyright: ignore

    def generate(self, *args: Any, lockstep: LockstepArgument = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with drafts where they are exact and cheaper.

        Where the base model keeps state outside the cache, as RWKV does, there is no cache, and a warning says so.

        Args:
            *args: as for the base model.
            lockstep: how to decode; the tokens are the same. True: the scaling pass runs one token ahead, in the
                mixture pass's forward. A number k > 1: it drafts k tokens, which one forward of the mixture pass
                verifies (speculative decoding). "lookup": the drafts are taken from the text where it repeats itself
                (prompt lookup), elsewhere as True. False: the passes run one after the other. None: the value of
                `generation_config.lockstep`, else for each token the strategy that is expected to be the cheapest.
            **kwargs: as for the base model.

        Returns:
            As the base model's `generate`; `lockstep_report` then has the counts.

        Raises:
            ConfigurationError: another value of `lockstep`.
        """
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        settings = given or self.get_base_model().generation_config
        choice = _choice(settings, parse(lockstep))
        state = self._loramix
        if state.uses.kept.is_any and (state.needs_scaling_pass or state.reads_text) and state.single_pass() is None:
            if kwargs.get("use_cache", getattr(settings, "use_cache", None)) is not False:
                _warn_once("the base model keeps state outside the cache", "use_cache")
            kwargs["use_cache"] = False
        with new_request(choice, self._loramix, cache_in(kwargs)) as call:
            try:
                out = super().generate(*args, **kwargs)  # pyright: ignore
            finally:
                report = call.report or LockstepReport(reason="only greedy decoding and sampling can")
                self._loramix.report = report
        after, asked_for = self._loramix.fixed_after, None
        if not isinstance(choice, Automatic | Sequential):
            asked_for = f"lockstep={getattr(settings, 'lockstep', None) if lockstep is None else lockstep!r}"
        elif after:
            asked_for = f"fix_routing(after={after})"
        if report.reason is not None and asked_for is not None and self._loramix.single_pass() is None:
            _warn_once(report.reason, asked_for)
        return out

    @property
    def lockstep_report(self) -> LockstepReport | None:
        """The counts of the last `generate`, such as forwards per token; None before the first."""
        return self._loramix.report

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching (`generate_batch`), for a single pass: it pages one cache only.

        Raises:
            UnsupportedOperationError: a mixture that routes each token: each of its two passes needs a cache, or its
                router keeps something beside the cache.
        """
        if self._loramix.reads_text and self._loramix.single_pass() is None:
            raise UnsupportedOperationError(
                "Continuous batching pages keys and values, and a router of text keeps something else of each text.",
                received="generate_batch, or a continuous batching manager, on such a mixture",
                remedy='call generate with a left-padded batch, use router="linear", or fix the routing first',
            )
        if self._loramix.needs_scaling_pass and self._loramix.single_pass() is None:
            raise UnsupportedOperationError(
                "Continuous batching pages one cache, and a mixture that routes each token has two.",
                received="generate_batch, or a continuous batching manager, on such a mixture",
                remedy="call generate with a left-padded batch, or fix the routing first: fix_routing(…)",
            )
        return super().init_continuous_batching(*args, **kwargs)  # pyright: ignore

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        return RequestProcessors(super()._get_logits_processor(*args, **kwargs), request())  # pyright: ignore

    def _sample(self, input_ids: Tensor, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        kwargs["stopping_criteria"] = RequestCriteria(kwargs["stopping_criteria"], request())
        call, mixture = super()._sample, self._loramix  # pyright: ignore
        cache = generation_cache(self.get_base_model(), generation_config, kwargs.get(CACHE))
        if cache is not None:
            kwargs[CACHE] = cache
        choice = _choice(generation_config, request().choice)
        reason = why_not_this_generation(self, mixture, choice, generation_config, cache)
        if reason is not None:
            request().report = LockstepReport(reason=reason)
            with no_session():
                return call(input_ids, *args, generation_config=generation_config, **kwargs)
        seen = generation_config.return_dict_in_generate or cache is request().cache
        seen = seen or mixture.hooks or mixture.log.enabled
        ends = None if seen else getattr(generation_config, "_eos_token_tensor", None)
        longest = getattr(generation_config, "max_length", None)
        new = None if longest is None else longest - input_ids.shape[1]
        session = Session(self, mixture, choice, cache, input_ids, new=new, ends=ends)
        request().report = session.report
        with decoding(session):
            return call(input_ids, *args, generation_config=generation_config, **kwargs)


def _choice(generation_config: Any, choice: Choice) -> Choice:
    """The choice of the call, else that of the generation configuration.

    Raises:
        ConfigurationError: the configuration names none.
    """
    return parse(getattr(generation_config, "lockstep", None)) if isinstance(choice, Automatic) else choice


_warned: set[str] = set()


def _warn_once(reason: str, asked_for: str) -> None:
    """Warn once for each reason why what was asked for is not done."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"{asked_for} has no effect: {reason}.", stacklevel=3)
