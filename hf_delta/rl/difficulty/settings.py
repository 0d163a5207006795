"""What may be asked of [`Difficulty`]."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from hf_delta.errors import InputError
from hf_delta.rl.difficulty.counts import Decay, Window


DEFAULT_DECAY = 0.7
# With 4 bytes a visit, 8 are what a prompt's 64 bytes have room for beside its bin, its slots and the room held ready.
LONGEST_WINDOW = 8


def checked_forgetting(decay: float | None, window: int | None) -> Decay | Window:
    """How rollouts are forgotten.

    Raises:
        `InputError`: both are given, or one out of its range.
    """
    if window is None:
        decay = DEFAULT_DECAY if decay is None else decay
        if not is_number(decay) or not 0 < decay <= 1:
            raise InputError(f"decay must be more than 0 and at most 1 (nothing is forgotten), got {decay!r}.")
        return Decay(float(decay))
    if decay is not None:
        raise InputError(f"Give decay or window and not both, got decay={decay!r} and window={window!r}.")
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= LONGEST_WINDOW:
        raise InputError(
            f"window must be a whole number of visits from 1 to {LONGEST_WINDOW}, got {window!r}; "
            "for a longer memory use decay, whose memory is about 1 / (1 - decay) visits."
        )
    return Window(window)


def checked_prior(prior: Sequence[float]) -> tuple[float, float]:
    """`(a, b)` of the Beta prior.

    Raises:
        `InputError`: it is not two positive numbers.
    """
    is_pair = isinstance(prior, Sequence) and not isinstance(prior, str) and len(prior) == 2
    if not is_pair or not all(is_number(value) and value > 0 for value in prior):
        raise InputError(
            f"prior must be two positive numbers, the right and wrong rollouts to start with, got {prior!r}; "
            "for example [1.0, 1.0]."
        )
    return float(prior[0]), float(prior[1])


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
