"""Whole numbers of rollouts that add up to a budget: separable convex problems, solved exactly."""

import heapq
from collections.abc import Callable, Sequence

import torch


Bound = int | torch.Tensor


def greedy_budget(
    values: torch.Tensor, budget: int, n_min: Bound, n_max: Bound, prompt_ids: Sequence[str]
) -> torch.Tensor:
    """The `n_i` that minimise `sum_i v_i / n_i` subject to `n_min <= n_i <= n_max` and `sum_i n_i = budget`.

    One rollout after another goes where it gains most, `v_i (1 / n_i - 1 / (n_i + 1))`. The gains of a prompt fall with its
    `n_i`, so that this is the optimum. Of equal gains, the prompt with fewer rollouts comes first, then the smaller id, then
    the place in the batch: equal values give equal budgets up to a remainder of 1, also if all of them are 0.

    Args:
        values (`torch.Tensor` of shape `(P,)`):
            Variance `v_i >= 0` of one rollout of each prompt.
        budget (`int`):
            Rollouts of all prompts together.
        n_min (`int` or `torch.Tensor` of shape `(P,)`):
            Smallest number for each prompt, at least 1.
        n_max (`int` or `torch.Tensor` of shape `(P,)`):
            Largest number for each prompt.
        prompt_ids (`Sequence[str]`):
            Decide between equal gains, so that the order of the batch does not.

    Returns:
        `torch.Tensor` of shape `(P,)`, int64.

    Raises:
        `ValueError`: no such numbers exist, or a value is negative or not finite.
    """
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise ValueError("The variances must be finite and not negative.")
    v = values.tolist()
    return _spend(lambda i, n: v[i] / (n * (n + 1)), budget, n_min, n_max, prompt_ids)


def nearest_budget(
    wishes: torch.Tensor, budget: int, n_min: Bound, n_max: Bound, prompt_ids: Sequence[str]
) -> torch.Tensor:
    """The `n_i` that minimise `sum_i (n_i - a_i)^2` for wishes `a_i`, under the constraints of [`greedy_budget`].

    Without bounds that is the same number of rollouts more or less for everyone, with the remainder by id.
    """
    a = wishes.tolist()
    return _spend(lambda i, n: a[i] - n, budget, n_min, n_max, prompt_ids)


def _spend(
    gain: Callable[[int, int], float], budget: int, n_min: Bound, n_max: Bound, prompt_ids: Sequence[str]
) -> torch.Tensor:
    """Spend the budget one by one where `gain(i, n)`, of the step of prompt `i` from `n` to `n + 1`, is largest.

    Exact for every gain that falls with `n`.
    """
    size = len(prompt_ids)
    counts = torch.as_tensor(n_min).expand(size).tolist()
    limits = torch.as_tensor(n_max).expand(size).tolist()
    left = budget - sum(counts)
    if left < 0 or sum(limits) < budget or any(low > high for low, high in zip(counts, limits)):
        raise ValueError(f"{budget} rollouts do not fit between {sum(counts)} and {sum(limits)} for {size} prompts.")
    queue = [(-gain(i, n), n, prompt_ids[i], i) for i, n in enumerate(counts) if n < limits[i]]
    heapq.heapify(queue)
    for _ in range(left):
        _, n, name, i = queue[0]
        counts[i] = n + 1
        if n + 1 < limits[i]:
            heapq.heapreplace(queue, (-gain(i, n + 1), n + 1, name, i))
        else:
            heapq.heappop(queue)
    return torch.tensor(counts, dtype=torch.int64)
