"""Bins of pass rates, with hysteresis."""

from collections.abc import Sequence

import numpy as np

from hf_delta.errors import InputError
from hf_delta.rl.difficulty.settings import is_number


class PassRateBins:
    """Bins `[0, e_1), [e_1, e_2), ..., [e_K, 1]`, counted from 0, the lowest pass rates.

    Something that was in bin `b` stays there while `e_b - h <= p < e_(b+1) + h` (with `e_0 = -inf` and `e_(K+1) = inf`): it
    must pass the boundary of its own bin by the hysteresis `h`, upwards as downwards. Then it goes to the bin that holds
    `p`, which may be several away.

    Args:
        edges (`Sequence[float]`): Inner edges, ascending, between 0 and 1; at most 99.
        hysteresis (`float`): `h >= 0`, in pass rate.

    Raises:
        `InputError`: edges or hysteresis are not that, or are such that the first or last bin cannot be entered from the next.
    """

    def __init__(self, edges: Sequence[float], hysteresis: float):
        if isinstance(edges, (str, bytes)) or not isinstance(edges, Sequence) or not all(map(is_number, edges)):
            raise InputError(f"edges must be a list of numbers between 0 and 1, got {edges!r}.")
        bounds = [0.0, *map(float, edges), 1.0]
        if not 1 <= len(edges) <= 99 or any(not low < high for low, high in zip(bounds, bounds[1:])):
            raise InputError(
                f"edges must be 1 to 99 ascending pass rates between 0 and 1, both excluded, got {list(edges)}; "
                "for example [0.2, 0.4, 0.6, 0.8]."
            )
        room = min(bounds[1], 1 - bounds[-2])
        if not is_number(hysteresis) or not 0 <= hysteresis < room:
            raise InputError(
                f"hysteresis must be at least 0 and less than {room:g}, the width of the first or last bin of the edges "
                f"{list(edges)}, so that every bin can be entered; got {hysteresis!r}."
            )
        self.edges = np.array(bounds[1:-1])
        self.hysteresis = float(hysteresis)
        # From where to where each bin keeps what is in it; the last entry, which -1 finds, keeps nothing.
        self._lows = np.concatenate([[-np.inf], self.edges - self.hysteresis, [np.inf]])
        self._highs = np.concatenate([self.edges + self.hysteresis, [np.inf, np.inf]])
        self.names = [f"{low}-{high}" for low, high in zip(bounds, bounds[1:])]

    def __len__(self) -> int:
        return len(self.names)

    def of(self, rates: np.ndarray, was: np.ndarray) -> np.ndarray:
        """Bin of each pass rate given the bin it was in, `was` (-1: in none); `(P,)` int64."""
        stays = (rates >= self._lows.take(was)) & (rates < self._highs.take(was))
        return np.where(stays, was, self.edges.searchsorted(rates, side="right"))
