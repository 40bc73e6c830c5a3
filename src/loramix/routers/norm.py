"""How strongly each expert answers to a token, against how strongly it usually does; no labels.

L: adapted layers. E: experts. R: total rank of a layer. r: the largest rank of an expert in a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from loramix.config.xlora import XLoraConfig
from loramix.errors import ConfigurationError
from loramix.experts.adapter import LoraWeights
from loramix.routers.from_experts import ExpertsRouter
from loramix.routers.router import RouterSizes, Shapes, register_router
from loramix.routers.start import Method


@register_router
class NormRouter(ExpertsRouter):
    """z_e = (log ‖R_e h_e‖ − μ_e) / σ_e, with B_e = Q_e R_e, so that ‖R_e h_e‖ = ‖B_e A_e x‖.

    μ and σ of each layer and expert are mean and standard deviation over some text (`assign`, or
    `init_router(model, "text", batches=…)`). Until then σ = 1 and μ_e = log ‖B_e A_e‖ (Frobenius): the answer is
    compared with the expert's size. An expert that replaces another in a saved mixture starts there too, moved by as
    much as the others are on average; these keep theirs. What it reads of an expert is A and B alone, also with DoRA.

    Args:
        sizes: what it is built for.

    Attributes:
        mean: (L, E): μ.
        deviation: (L, E): σ.
        factors: (L, E, r, r): R, filled up with zeros.

    Source: SpectR, arXiv 2504.03454, whose scores are the norms themselves (μ = 0, σ = 1); SEQR, arXiv 2509.18093, the
    factors R and the calibration.
    """

    kind = "norm"

    def __init__(self, sizes: RouterSizes) -> None:
        super().__init__(sizes)
        shape = sizes.layers, sizes.experts
        rank = _largest_rank(sizes)
        self._kept: set[int] = set()
        every = tuple(expert for expert in range(sizes.experts) for _ in range(rank))
        self._regular = [ranks == every for ranks in sizes.expert_of_rank]  # each expert with r ranks, in order
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))
        self.register_buffer("factors", torch.zeros(*shape, rank, rank))
        self.register_buffer("columns", _columns(sizes, rank), persistent=False)

    mean: Tensor
    deviation: Tensor
    factors: Tensor
    columns: Tensor

    @classmethod
    def build(cls, config: XLoraConfig, sizes: RouterSizes) -> Self:
        return cls(sizes)

    @classmethod
    def shapes(cls, config: XLoraConfig, sizes: RouterSizes) -> Shapes:
        shape, rank = (sizes.layers, sizes.experts), _largest_rank(sizes)
        return {"offset": shape, "mean": shape, "deviation": shape, "factors": (*shape, rank, rank)}

    @classmethod
    def check_start(cls, config: XLoraConfig, experts: int, method: Method) -> None:
        if method != "text":
            raise ConfigurationError(
                "A norm router is calibrated on text without labels.",
                received=f'method={method!r} for router="norm"',
                remedy='use method="text"',
            )

    def layer_logits(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        usual = (self.log_norms(layer, low_rank) - self.mean[layer]) / self.deviation[layer]
        return usual + self.offset[layer]

    def for_pass(self) -> Callable[[int, Tensor], Tensor]:
        """The same, as log ‖R_e h_e‖ · (1 / σ_e) + (offset_e − μ_e / σ_e)."""
        factor, inverse = self.factors.transpose(-1, -2).unbind(), self.deviation.reciprocal()
        slope, start = inverse.unsqueeze(-1).unbind(), (self.offset - self.mean * inverse).unsqueeze(-1).unbind()

        def logits(layer: int, low_rank: Tensor) -> Tensor:
            logs = self._logs(layer, low_rank.flatten(0, -2), factor[layer])
            return torch.addcmul(start[layer], logs, slope[layer]).T.unflatten(0, low_rank.shape[:-1])

        return logits

    def log_norms(self, layer: int, low_rank: Float[Tensor, "*tokens R"]) -> Float[Tensor, "*tokens E"]:
        """log ‖R_e h_e‖ of each expert."""
        logs = self._logs(layer, low_rank.flatten(0, -2), self.factors[layer].transpose(-1, -2))
        return logs.T.unflatten(0, low_rank.shape[:-1])

    def _logs(self, layer: int, h: Float[Tensor, "N R"], factor: Float[Tensor, "E r r"]) -> Float[Tensor, "E N"]:
        """log ‖R_e h_e‖, from the transposed factors."""
        if not self._regular[layer]:
            filled = torch.cat([h, h.new_zeros(len(h), 1)], dim=-1)
            h = filled.index_select(-1, self.columns[layer].flatten())
        answers = torch.bmm(h.view(len(h), len(factor), -1).transpose(0, 1), factor)
        return torch.linalg.vector_norm(answers, dim=-1).clamp_min(_LEAST).log()

    @torch.no_grad()
    def assign(self, mean: Float[Tensor, "L E"], deviation: Float[Tensor, "L E"]) -> None:
        """Set μ and σ."""
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def load(self, saved: Mapping[str, Tensor], replaced: Collection[int] = ()) -> None:
        """With other experts, those that stay keep μ and σ, if they adapt as many layers as before."""
        super().load(saved, replaced)
        if replaced and saved["mean"].shape == self.mean.shape:
            self.assign(saved["mean"], saved["deviation"])
            self._kept = set(range(self.mean.shape[1])) - set(replaced)

    @torch.no_grad()
    def follow(self, experts: Sequence[Mapping[int, LoraWeights]]) -> None:
        mean = self.mean.clone()
        super().follow(experts)  # and μ is log ‖B A‖
        kept = self.offset == 0
        kept[:, [expert for expert in range(kept.shape[1]) if expert not in self._kept]] = False
        count = kept.sum(1, keepdim=True).clamp_min(1)
        moved = (mean - self.mean).masked_fill(~kept, 0.0).sum(1, keepdim=True) / count
        deviation = self.deviation.masked_fill(~kept, 0.0).sum(1, keepdim=True) / count
        deviation = deviation.masked_fill(~kept.any(1, keepdim=True), 1.0)
        self.assign(torch.where(kept, mean, self.mean + moved), torch.where(kept, self.deviation, deviation))

    def take(self, layer: int, expert: int, A: Float[Tensor, "r n"], B: Float[Tensor, "out r"]) -> None:
        up, down = torch.linalg.qr(B.double())[1], torch.linalg.qr(A.double().T)[1]
        self.mean[layer, expert] = torch.linalg.matrix_norm(up @ down.T).log().float()
        self.factors[layer, expert, : up.shape[0], : up.shape[1]] = up.float()


_LEAST = 1e-15
"""Of a norm: the logarithm stays finite, for an expert that does not answer at all."""


def _largest_rank(sizes: RouterSizes) -> int:
    return max((ranks.count(expert) for ranks in sizes.expert_of_rank for expert in set(ranks)), default=0)


def _columns(sizes: RouterSizes, rank: int) -> Tensor:
    """(L, E, r): where the ranks of each expert are in h, R where it has no more."""
    found = torch.empty(sizes.layers, sizes.experts, rank, dtype=torch.long)
    for layer, ranks in enumerate(sizes.expert_of_rank):
        found[layer] = len(ranks)
        for expert in set(ranks):
            own = [column for column, owner in enumerate(ranks) if owner == expert]
            found[layer, expert, : len(own)] = torch.tensor(own)
    return found
