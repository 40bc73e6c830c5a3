"""The share of right drafts, estimated without computing any."""

from __future__ import annotations

import pytest
import torch

from loramix.decoding.acceptance import ENOUGH, RECENT, SHORTLIST, Acceptance, would_draft


def test_an_estimate_needs_some_drafts_or_an_earlier_text() -> None:
    found = Acceptance()
    for _ in range(ENOUGH):
        assert found.rate is None
        found.add(True)
    assert found.rate == pytest.approx(3.5 / 4)
    assert Acceptance(prior=0.75).rate == 0.75


def test_the_estimate_follows_the_text() -> None:
    found = Acceptance(prior=1.0)
    rates = []
    for _ in range(8):
        found.add(False)
        rates.append(found.rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(2 / 3)
    assert rates[-1] == pytest.approx(0.2)
    for _ in range(RECENT):
        found.add(True)
    assert found.rate == 1.0
    assert found.right == RECENT


@pytest.mark.parametrize("bias", [False, True])
def test_a_shortlist_tells_what_the_whole_head_would_draft(bias: bool) -> None:
    """A no is certain; a yes is wrong only where the largest logit is outside of the shortlist."""
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 200, bias=bias)
    hidden = torch.randn(400, 16)
    logits = head(hidden + 0.5 * torch.randn(400, 16))  # the mixture pass's: similar
    with torch.no_grad():
        drafts = head(hidden).argmax(-1)
        chosen = torch.where(torch.arange(400) % 2 == 0, drafts, logits.argmax(-1))
        found = would_draft(head, hidden, logits, chosen)
    assert bool(found[drafts == chosen].all())
    listed = (logits.topk(SHORTLIST).indices == drafts[:, None]).any(-1)
    assert torch.equal(found[listed], (drafts == chosen)[listed])
    assert 0 < int((~found).sum()) < 200
