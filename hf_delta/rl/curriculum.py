"""What a run learns about its prompts: how often each is solved, its group, and how many rollouts it gets."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_delta.errors import InputError, said_by
from hf_delta.rl.allocation import PromptBatch
from hf_delta.rl.difficulty import Difficulty, PassRates
from hf_delta.rl.weights.base import transform_name


PASS_RATE = "pass_rate"


@dataclass(frozen=True)
class Plan:
    """One generation batch of `P` prompts and `N` rollouts, before it is generated; the same on every rank.

    Args:
        prompt_ids (`list[str]` of length P):
            Stable ids.
        pooled (`list[str]` of length P, *optional*):
            Value of each prompt's `prior_column`.
        rates (`PassRates`):
            What is known of each prompt's pass rate.
        groups (`torch.Tensor` of shape `(P,)`, int64):
            Difficulty group of each prompt, -1 for none.
        group_names (`tuple[str, ...]`):
            Names of the groups.
        counts (`torch.Tensor` of shape `(P,)`, int64):
            Rollouts of each prompt.
        weights (`torch.Tensor` of shape `(P,)`, float64):
            Weight of one rollout of each prompt.
    """

    prompt_ids: list[str]
    pooled: list[str] | None
    rates: PassRates
    groups: torch.Tensor
    group_names: tuple[str, ...]
    counts: torch.Tensor
    weights: torch.Tensor

    @cached_property
    def group_ids(self) -> torch.Tensor:
        """Place of each rollout's prompt in this plan, `(N,)`."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), self.counts)


class Curriculum:
    """Groups prompts by difficulty and hands out rollouts, from gathered data and its own state only.

    Args:
        difficulty ([`~hf_delta.rl.difficulty.Difficulty`]):
            Posterior of every prompt's pass rate.
        prompt_groups (`str`, *optional*, defaults to `"pass_rate"`):
            `"pass_rate"` for the bins of `difficulty`, or a column of the dataset.
        group_names (`tuple[str, ...]`, *optional*):
            Values of that column, where they are known beforehand; others are added as they come.
        allocation (`Callable`, *optional*):
            Allocation rule, see [`~hf_delta.rl.allocation.AllocationRule`]; without one prompts get equally many rollouts.
        rollout_weighting (`str`, *optional*, defaults to `"prompt"`):
            `"prompt"`: a prompt's rollouts together weigh as much as any other prompt's; `"sample"`: every rollout does.
    """

    def __init__(
        self,
        difficulty: Difficulty,
        prompt_groups: str = PASS_RATE,
        group_names: tuple[str, ...] = (),
        allocation: Callable[[PromptBatch], torch.Tensor] | None = None,
        rollout_weighting: str = "prompt",
    ):
        self.difficulty = difficulty
        self.allocation = allocation
        self.group_column = None if prompt_groups == PASS_RATE else prompt_groups
        self.prior_column = difficulty.prior_column
        self.rollout_weighting = rollout_weighting
        self._index = {name: place for place, name in enumerate(group_names)}

    @property
    def columns(self) -> list[str]:
        """Columns of the dataset that a row must have."""
        return sorted({"prompt_id", self.group_column, self.prior_column} - {None})

    @property
    def group_names(self) -> tuple[str, ...]:
        return tuple(self._index) if self.group_column else tuple(self.difficulty.group_names)

    def plan(self, prompts: list[dict[str, Any]], budget: int) -> Plan:
        """Groups and numbers of rollouts for these prompts, one row each.

        Raises:
            `InputError`: a row lacks a value, or the allocation rule fails or does not hand out exactly `budget`.
        """
        ids, pooled = _values(prompts, "prompt_id", "prompt_id"), None
        if self.prior_column:
            pooled = _values(prompts, self.prior_column, "difficulty_kwargs: prior_column")
        rates = self.difficulty.estimate(ids, pooled)
        groups = self._groups(prompts, ids, pooled)
        mean = budget // len(ids)
        counts = torch.full((len(ids),), mean)
        if self.allocation is not None:
            batch = PromptBatch(ids, rates, groups, len(self.group_names), budget)
            counts = self._checked(self.allocation, batch)
        weights = mean / counts.double() if self.rollout_weighting == "prompt" else torch.ones(len(ids)).double()
        return Plan(ids, pooled, rates, groups, self.group_names, counts, weights)

    def _groups(self, prompts: list[dict[str, Any]], ids: list[str], pooled: list[str] | None) -> torch.Tensor:
        if self.group_column is None:
            return self.difficulty.groups(ids, pooled)
        names = _values(prompts, self.group_column, "prompt_groups")
        return torch.tensor([self._index.setdefault(name, len(self._index)) for name in names])

    @staticmethod
    def _checked(rule: Callable[[PromptBatch], torch.Tensor], batch: PromptBatch) -> torch.Tensor:
        name = transform_name(rule)
        try:
            counts = torch.as_tensor(rule(batch), dtype=torch.int64)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"rollout_allocation: {name} raised {said_by(error)}") from error
        if counts.shape != (len(batch.prompt_ids),) or int(counts.sum()) != batch.budget or int(counts.min()) < 2:
            raise InputError(
                f"rollout_allocation: {name} returned {counts.tolist()} for {len(batch.prompt_ids)} prompts; it must return "
                f"for each at least 2 rollouts, {batch.budget} in all."
            )
        return counts

    def learn(self, plan: Plan, scored: torch.Tensor, correct: torch.Tensor) -> None:
        """Take in one batch of results: whether each rollout `(N,)` has a score, and whether it is correct."""
        size = len(plan.counts)
        rollouts = torch.bincount(plan.group_ids[scored], minlength=size)
        solved = torch.bincount(plan.group_ids[scored & correct], minlength=size)
        self.difficulty.update(plan.prompt_ids, solved, rollouts, plan.pooled)
        update = getattr(self.allocation, "update", None)
        if update is not None:
            batch = PromptBatch(
                plan.prompt_ids, plan.rates, plan.groups, len(plan.group_names), int(plan.counts.sum())
            )
            update(batch, rollouts, solved)

    def metrics(self, plan: Plan) -> dict[str, float]:
        """Numbers for the log: rollouts of each group's prompts, and how much is known."""
        seen, counts = plan.rates.seen.tolist(), plan.counts.tolist()
        found = {
            "difficulty/pass_rate": plan.rates.mean.mean().item(),
            "difficulty/unseen": seen.count(0.0) / len(seen),
        }
        if self.allocation is None:
            return found
        if hasattr(self.allocation, "log_metrics"):
            found |= self.allocation.log_metrics()
        found |= {"rollouts/min": min(counts), "rollouts/max": max(counts)}
        of_group: dict[int, list[int]] = {}
        for group, count in zip(plan.groups.tolist(), counts):
            of_group.setdefault(group, []).append(count)
        names = {index: plan.group_names[index] for index in of_group if index >= 0}
        return found | {f"gdro/rollouts/{n}": sum(of_group[i]) / len(of_group[i]) for i, n in names.items()}

    def state_dict(self) -> dict[str, Any]:
        allocation = getattr(self.allocation, "state_dict", dict)()
        return {"difficulty": self.difficulty.state_dict(), "allocation": allocation, "names": list(self._index)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.difficulty.load_state_dict(state["difficulty"])
        self._index = {name: place for place, name in enumerate(state["names"])}
        if state["allocation"]:
            self.allocation.load_state_dict(state["allocation"])


def _values(rows: list[dict[str, Any]], column: str, key: str) -> list[str]:
    for row in rows:
        if row.get(column) is None:
            what = "has no column" if column not in row else "is None in the column"
            raise InputError(f"{key}: the row with the prompt_id {row.get('prompt_id')!r} {what} {column!r}.")
    return [str(row[column]) for row in rows]
