"""A model's way through its vocabulary: logits a tile of rows and tokens at a time, and the sums of their softmax."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Logits:
    """How a head makes logits of a product: `z = c tanh(s (W h + b) / c) / temperature`, or `s (W h + b) / temperature`.

    Args:
        scale (`float`, *optional*, defaults to `1.0`): `s`, of the models' `logit_scale` and its relatives.
        softcap (`float`, *optional*): `c`, of the models' `final_logit_softcapping`.
        temperature (`float`, *optional*, defaults to `1.0`): Divides what the model gives.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """`dz / d(W h + b)` where the cap does not bend."""
        return self.scale / self.temperature

    def project(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor):
        """Write the logits `(n, v)` of `hidden (n, d)`, `weight (v, d)` and `bias (v,)` to `out`."""
        inner = self.factor if self.softcap is None else self.scale / self.softcap
        if bias is None:
            out.addmm_(hidden, weight.T, beta=0, alpha=inner)
        else:
            torch.addmm(bias, hidden, weight.T, beta=inner, alpha=inner, out=out)
        if self.softcap is not None:
            out.tanh_().mul_(self.softcap / self.temperature)

    def bend(self, z: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`1 - tanh^2` of logits: what the cap leaves of a gradient."""
        return torch.mul(z, z, out=out).mul_(-((self.temperature / self.softcap) ** 2)).add_(1)


def spans(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class Side:
    """A model's rows on their way through the vocabulary.

    `hidden (N, d)` and `weight (V, d)` of any floating dtype; all that is computed has the dtype `wide`. The sums are
    those of a softmax in one pass: `total (N, 1)` is `sum_v exp(z_v - peak)` for the largest logit `peak (N, 1)` so far.
    """

    def __init__(self, hidden, weight, bias, logits: Logits, tile: tuple[int, int], wide: torch.dtype):
        self.hidden, self.weight, self.bias, self.logits, self.wide = hidden, weight, bias, logits, wide
        self.buffer = hidden.new_empty(tile[0] * tile[1], dtype=wide)
        self.peak = hidden.new_full((len(hidden), 1), -torch.inf, dtype=wide)
        self.total = torch.zeros_like(self.peak)
        self.chosen = torch.zeros_like(self.peak)

    def enter(self, columns: slice) -> None:
        """Go on to a block of the vocabulary."""
        self.columns = columns
        self.block = self.weight[columns].to(self.wide)
        self.block_bias = None if self.bias is None else self.bias[columns].to(self.wide)

    def tile(self, rows: slice) -> torch.Tensor:
        """Logits `(n, v)` of some rows in this block; the next tile overwrites them."""
        hidden = self.hidden[rows].to(self.wide)
        out = view_of(self.buffer, len(hidden), len(self.block))
        self.logits.project(hidden, self.block, self.block_bias, out)
        return out

    def here(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Place of targets `(n,)` in this block, some place if they are in another, and whether they are here."""
        place = (targets - self.columns.start)[:, None]
        found = (place >= 0) & (place < len(self.block))
        return place.clamp(0, len(self.block) - 1), found

    def choose(self, rows: slice, tile: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep the logits of the targets `(n,)` that are in this block."""
        place, found = self.here(targets)
        self.chosen[rows] = torch.where(found, tile.gather(1, place), self.chosen[rows])

    def fold(self, rows: slice, tile: torch.Tensor, spare: torch.Tensor | None = None) -> torch.Tensor:
        """Turn a tile into `exp(z - peak)` in place, add it up, and say by what `(n, 1)` earlier sums shrink.

        `spare (n, v)` is left with `z - peak`.
        """
        peak = torch.maximum(self.peak[rows], tile.amax(1, keepdim=True))
        shrink = (self.peak[rows] - peak).exp_()
        self.peak[rows] = peak
        torch.exp(torch.sub(tile, peak, out=tile if spare is None else spare), out=tile)
        self.total[rows] = self.total[rows].mul_(shrink).add_(tile.sum(1, keepdim=True))
        return shrink

    def log_total(self) -> torch.Tensor:
        """`log sum_v exp(z_v)` `(N, 1)`, when the vocabulary is through."""
        return self.peak + self.total.log()


def view_of(buffer: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return buffer[: rows * columns].view(rows, columns)
