"""Entropy, collision probability, mean logit and top-1 hit of a next-token distribution, on the way through its tiles."""

import torch

from hf_delta.ops.token_sides import Side


class ObservedSide(Side):
    """A [`Side`] that adds up, beside its softmax, what its distribution looks like; sums `(N, 1)`.

    `excess` is `sum_v exp(z_v - peak) (z_v - peak)`, `squares` is `sum_v exp(z_v - peak)^2`, `sum` is `sum_v z_v`, and
    `earlier` is the largest logit of the tokens before the target.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.excess, self.squares, self.sum = (torch.zeros_like(self.total) for _ in range(3))
        self.earlier = torch.full_like(self.peak, -torch.inf)

    def choose(self, rows: slice, tile: torch.Tensor, targets: torch.Tensor) -> None:
        super().choose(rows, tile, targets)
        self.sum[rows] += tile.sum(1, keepdim=True)
        place, found = self.here(targets)
        here = found.squeeze(1).nonzero().squeeze(1)
        later = torch.arange(tile.shape[1], device=tile.device) >= place[here]
        within = tile[here].masked_fill_(later, -torch.inf).amax(1, keepdim=True)
        # The largest so far is that of the blocks before this one.
        self.earlier[rows].index_copy_(0, here, torch.maximum(self.peak[rows][here], within))

    def fold(self, rows: slice, tile: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        total = self.total[rows].clone()
        shrink = super().fold(rows, tile, spare)
        # A larger peak lowers every earlier `z - peak` by -log(shrink); the product is 0 where nothing is left of them.
        lowered = total.mul_(torch.special.xlogy(shrink, shrink))
        self.excess[rows] = self.excess[rows].mul_(shrink).add_(lowered).add_(spare.mul_(tile).sum(1, keepdim=True))
        own = torch.linalg.vector_norm(tile, dim=1, keepdim=True).square_()
        self.squares[rows] = self.squares[rows].mul_(shrink.square()).add_(own)
        return shrink

    def statistics(self) -> tuple[torch.Tensor, ...]:
        """`entropy`, `log_sum_sq_probs`, `mean_logits` and `is_top1` `(N,)`, when the vocabulary is through."""
        log_total = self.total.log()
        found = (
            # Two terms that are not negative: nothing cancels.
            log_total - self.excess / self.total,
            self.squares.log() - 2 * log_total,
            self.sum / len(self.weight),
            (self.chosen >= self.peak) & (self.chosen > self.earlier),
        )
        return tuple(statistic.squeeze(1) for statistic in found)
