"""From what is known about the prompts of a batch to a number of rollouts for each: torch in, torch out."""

from hf_delta.rl.allocation.base import AllocationRule, PromptBatch
from hf_delta.rl.allocation.budget import greedy_budget, nearest_budget
from hf_delta.rl.allocation.rollout_gdro import RolloutGDRO


# One line per rule: the key is what a recipe writes under `rollout_allocation:`.
ALLOCATION_RULES: dict[str, type] = {
    "rollout_gdro": RolloutGDRO,
}

__all__ = [
    "ALLOCATION_RULES",
    "AllocationRule",
    "PromptBatch",
    "RolloutGDRO",
    "greedy_budget",
    "nearest_budget",
]
