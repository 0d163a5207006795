"""What one generation batch brings: right and wrong rollouts, one visit per key."""

import numpy as np
import torch

from hf_delta.errors import InputError


def right_and_wrong(correct: torch.Tensor, rollouts: torch.Tensor, size: int) -> np.ndarray:
    """Right and wrong rollouts of each prompt, `(P, 2)` int64.

    Raises:
        `InputError`: not `0 <= correct <= rollouts` in whole numbers, one of each per prompt.
    """
    right, total = _whole("correct", correct, size), _whole("rollouts", rollouts, size)
    bad = (right < 0) | (right > total)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(f"Entry {row} has {right[row]} correct of {total[row]} rollouts; 0 <= correct <= rollouts.")
    return np.array([right, total - right]).T


def _whole(name: str, given: torch.Tensor, size: int) -> np.ndarray:
    values = torch.as_tensor(given).detach().cpu()
    if values.shape != (size,):
        raise InputError(f"{name} has shape {tuple(values.shape)}; it must have one entry per prompt, ({size},).")
    if values.dtype == torch.int64:
        return values.numpy()
    whole = values.to(torch.int64)
    # NaN and infinity become some number or other, and differ from it.
    if not bool((whole.to(torch.float64) == values.to(torch.float64)).all()):
        raise InputError(f"{name} must be whole numbers, got {values[whole != values][0].item()}.")
    return whole.numpy()


def merged_visits(keys: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One visit per key out of a batch in which keys repeat: keys, their summed counts, and where each stood first.

    A key without a single rollout is left out: there was nothing to see.
    """
    order = keys.argsort(kind="stable")
    ascending = keys.take(order)
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = ascending[1:] != ascending[:-1]
    starts = starts.nonzero()[0]
    summed = np.add.reduceat(new.take(order, 0), starts)
    visited = summed.any(1).nonzero()[0]
    starts = starts.take(visited)
    return ascending.take(starts), summed.take(visited, 0), order.take(starts)
