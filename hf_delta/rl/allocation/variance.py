"""The controller `variance` of Rollout-GDRO: rollouts where they lower the variance of the gradient most."""

import math

import torch

from hf_delta.errors import InputError
from hf_delta.rl.allocation.base import PromptBatch
from hf_delta.rl.allocation.budget import greedy_budget


# Correct rollouts that must still be remembered for a prompt to count as solved. Under a decay none ever counts 0.
_REMEMBERED = 0.05


class VarianceController:
    """Minimises `sum_i v_i / n_i` at the budget of the batch, `v_i = E[p_i (1 - p_i)]` under the posterior of pass rate `p_i`.

    `v_i / n_i` is the variance of the mean reward of the prompt's rollouts, and stands for that of its gradient. Between the
    bounds the optimum is the square-root law `n_i ~ sqrt(v_i)` of "Group Distributionally Robust Optimization-Driven
    Reinforcement Learning for LLM Reasoning" (arXiv 2601.19280, theorem 4.2), here prompt by prompt and in whole numbers, see
    [`greedy_budget`]. Prompts with the same posterior get the same, up to a remainder of 1 that goes by id; of two prompts that always failed, the one
    tried less often gets more, because less is known about it.

    The law alone gives prompts that were never solved next to nothing, and so the fewest chances to be solved. `exploration`
    puts a floor under those that were seen and of which no correct rollout is remembered:
    `n_min + exploration * (mean - n_min)`, rounded up. The other prompts pay for it: the budget is what it was, and the
    rollouts are taken from where they lower the variance least. The floor is never above the mean, so that it always fits;
    if all prompts are unsolved, nobody is left to pay, and 1 makes the budgets uniform.

    Args:
        exploration (`float`, *optional*, defaults to `0.5`):
            In [0, 1]: floor for unsolved prompts, from 0 for `n_min` to 1 for the mean.

    Raises:
        `InputError`: `exploration` is out of range.
    """

    def __init__(self, exploration: float = 0.5):
        if isinstance(exploration, bool) or not isinstance(exploration, (int, float)) or not 0 <= exploration <= 1:
            raise InputError(f"exploration must be a number in [0, 1], got {exploration!r}.")
        self.exploration = exploration

    def __call__(self, batch: PromptBatch, allowed: range) -> torch.Tensor:
        unsolved = (batch.rates.seen > 0) & (batch.rates.solved < _REMEMBERED)
        n_min = torch.where(unsolved, self._floor(allowed[0], batch.mean), allowed[0])
        return greedy_budget(batch.rates.variance_of_reward, batch.budget, n_min, allowed[-1], batch.prompt_ids)

    def _floor(self, n_min: int, mean: float) -> int:
        # The subtraction keeps 3.0000000000000004 from becoming 4.
        floor = math.ceil(n_min + self.exploration * (mean - n_min) - 1e-9)
        return min(floor, math.floor(mean))
