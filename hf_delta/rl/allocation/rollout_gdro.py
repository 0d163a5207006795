"""The rule `rollout_gdro`: one of its controllers, with bounds on the rollouts of a prompt."""

import inspect
import math
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.rl.allocation.base import PromptBatch
from hf_delta.rl.allocation.exp3 import Exp3Controller
from hf_delta.rl.allocation.variance import VarianceController
from hf_delta.rl.weights.prompt_gdro import PAPER


# One line per controller: the key is what a recipe writes under `controller:`.
CONTROLLERS: dict[str, type] = {
    "variance": VarianceController,
    "exp3": Exp3Controller,
}


class RolloutGDRO:
    """Rollouts `(P,)` for the prompts of a batch, `n_min <= n_i <= n_max` and `sum_i n_i` exactly the budget of the batch.

    "Group Distributionally Robust Optimization-Driven Reinforcement Learning for LLM Reasoning" (arXiv 2601.19280).

    Args:
        controller (`str`, *optional*, defaults to `"variance"`):
            `"variance"`, the square-root law on the posterior of each prompt, see [`VarianceController`], or `"exp3"`, the
            paper's bandit on difficulty groups, see [`Exp3Controller`].
        n_min (`int`, *optional*, defaults to `2`):
            Fewest rollouts of a prompt, at least 2: one rollout has nothing to be compared with.
        n_max (`int`, *optional*):
            Most rollouts of a prompt. Three times the mean by default.
        settings:
            Arguments of the controller: `exploration` of `"variance"`; `eta`, `gamma`, `price_rate` and `seed` of `"exp3"`.

    Raises:
        `InputError`: a setting is unknown, belongs to another controller, or is out of range.
    """

    paper = PAPER

    def __init__(self, controller: str = "variance", n_min: int = 2, n_max: int | None = None, **settings: Any):
        if controller not in CONTROLLERS:
            raise InputError(f"controller: {controller!r} is not one of {', '.join(CONTROLLERS)}.")
        _check_keys(controller, settings)
        _check_bounds(n_min, n_max)
        self.name, self.n_min, self.n_max = controller, n_min, n_max
        self.controller = CONTROLLERS[controller](**settings)

    def check(self, budget: int, prompts: int) -> None:
        """Refuse batches of `prompts` prompts with `budget` rollouts in which nothing can be allocated.

        Raises:
            `InputError`: there are fewer than 2 prompts, or the bounds leave no way to meet the budget.
        """
        if prompts < 2:
            raise InputError(
                f"rollout_gdro shares out rollouts among the prompts of a generation batch, and here a batch holds {prompts}. "
                "Raise generation_batch_size (or gradient_accumulation_steps), or remove rollout_allocation."
            )
        mean = budget / prompts
        if self.n_min > mean:
            raise InputError(
                f"rollout_gdro: n_min is {self.n_min}, but {budget} rollouts for {prompts} prompts are {mean:g} each. Lower "
                "n_min, or raise num_generations."
            )
        if self.n_max is not None and self.n_max < mean:
            raise InputError(
                f"rollout_gdro: n_max is {self.n_max}, but {budget} rollouts for {prompts} prompts are {mean:g} each. Raise "
                "n_max, or lower num_generations."
            )

    def __call__(self, batch: PromptBatch) -> torch.Tensor:
        self.check(batch.budget, len(batch))
        return self.controller(batch, self._allowed(batch))

    def update(self, batch: PromptBatch, counts: torch.Tensor, correct: torch.Tensor) -> None:
        """Let the controller learn from scored rollouts, see [`AllocationRule`]."""
        if hasattr(self.controller, "update"):
            self.controller.update(batch, self._allowed(batch), counts, correct)

    def log_metrics(self) -> dict[str, float]:
        return self.controller.log_metrics() if hasattr(self.controller, "log_metrics") else {}

    def state_dict(self) -> dict[str, Any]:
        learnt = self.controller.state_dict() if hasattr(self.controller, "state_dict") else {}
        return {"controller": self.name, "learnt": learnt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            `InputError`: it was written by another controller.
        """
        if state["controller"] != self.name:
            raise InputError(
                f"rollout_gdro: the checkpoint was written with controller: {state['controller']}, this run has {self.name}."
            )
        if hasattr(self.controller, "load_state_dict"):
            self.controller.load_state_dict(state["learnt"])

    def _allowed(self, batch: PromptBatch) -> range:
        return range(self.n_min, (self.n_max or math.floor(3 * batch.mean)) + 1)


def _settings(controller: str) -> set[str]:
    return set(inspect.signature(CONTROLLERS[controller]).parameters)


def _check_keys(controller: str, settings: dict[str, Any]) -> None:
    known = _settings(controller)
    for key in settings:
        owners = [name for name in CONTROLLERS if key in _settings(name)]
        if key not in known and owners:
            raise InputError(
                f"{key} belongs to controller: {owners[0]} and does nothing with controller: {controller}. "
                "Remove it, or change the controller."
            )
        if key not in known:
            raise InputError(
                f"rollout_gdro has no setting {key!r}. With controller: {controller} it has controller, n_min, n_max, "
                f"{', '.join(sorted(known))}."
            )


def _check_bounds(n_min: int, n_max: int | None) -> None:
    for key, value in (("n_min", n_min), ("n_max", n_max)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InputError(f"{key} must be a whole number, got {value!r}.")
    if n_min < 2:
        raise InputError(f"n_min must be at least 2, got {n_min}: the advantage of a single rollout is 0.")
    if n_max is not None and n_max < n_min:
        raise InputError(f"n_max ({n_max}) is below n_min ({n_min}).")
