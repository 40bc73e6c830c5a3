"""`generate` in lockstep: transformers' own loop, with a model that may read a token of both passes at once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loramix.lockstep import Lockstep, LockstepReport, asked, decoding, paused, session_of, tell, wanted_by
from loramix.methods import PeftMethods
from loramix.passes import MixtureState


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

    def generate(self, *args: Any, lockstep: bool | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with both passes in one forward per token where that is exact and pays.

        Args:
            *args: as for the base model.
            lockstep: True: wherever it is exact; False: never; None: what `generation_config.lockstep` says, else
                while it is measured to be the cheaper way. The text is the same.
            **kwargs: as for the base model.

        Returns:
            What the base model's `generate` returns; `lockstep_report` then says how it went.
        """
        self._loramix.report = None
        with asked(lockstep):
            out = super().generate(*args, **kwargs)  # pyright: ignore
        report, after = self._loramix.report, self._loramix.fixed_after
        reason = "only greedy decoding and sampling can" if report is None else report.reason
        if reason is not None and (lockstep or after):
            tell(reason, "lockstep=True" if lockstep else f"fix_routing(after={after})")
        return out

    @property
    def lockstep_report(self) -> LockstepReport | None:
        """How the last `generate` decoded: forwards per token, and the share of right drafts; None before the first."""
        return self._loramix.report

    def _sample(self, input_ids: Tensor, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        call, state = super()._sample, self._loramix  # pyright: ignore
        wanted = wanted_by(generation_config)
        reason = _no_lockstep(self, state, wanted, generation_config, kwargs.get("past_key_values"))
        if reason is not None:
            state.report = LockstepReport(reason=reason)
        else:
            ends = getattr(generation_config, "_eos_token_tensor", None)
            session = Lockstep(self, state, wanted, ends)
            state.report = session.report
            with decoding(session):
                return call(input_ids, *args, generation_config=generation_config, **kwargs)
        return call(input_ids, *args, generation_config=generation_config, **kwargs)


def _no_lockstep(
    model: Any, state: MixtureState, wanted: bool | None, generation_config: Any, cache: Any
) -> str | None:
    if wanted is False and state.fixed_after is None:
        return "it was not wanted"
    if state.single_pass() is not None:
        return "there is only one pass"
    if model.training:
        return "the model is in training mode, where dropout draws for each pass"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder reads its encoder's scalings"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "attentions or hidden states are asked for"
    if not generation_config.use_cache:
        return "there is no cache"
    if getattr(cache, "is_compileable", False):
        return "the cache is a static one"
    if generation_config.is_assistant or model.device.type == "mps":
        return "an assistant, or a device that stops late, decodes"
    return None
