"""Reward functions as judges of right and wrong."""

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.imports import load_object
from hf_delta.rl.rewards import NAMED_REWARDS, checked_reward


CORRECT_ABOVE = 0.5


def load_reward(reward: str | Callable) -> Callable:
    """A reward function by name (`playground_reward`), by dotted path, or as it is.

    Raises:
        InputError: if it cannot be found or called, or is a reward model.
    """
    if isinstance(reward, str):
        reward = load_object(NAMED_REWARDS.get(reward, reward), "reward")
    if isinstance(reward, torch.nn.Module) or not callable(reward):
        raise InputError(
            f"reward: {reward!r:.80} is not a function. Evaluation needs a reward function in TRL's form, whose reward is "
            f"above {CORRECT_ABOVE} where a completion is correct."
        )
    return reward


def reward_name(reward: Callable) -> str:
    """What reports call a reward function."""
    return getattr(reward, "__name__", type(reward).__name__)


def judge(reward: Callable, rows: list[dict[str, Any]], texts: list[str], ids: list[list[int]]) -> list[bool]:
    """Which completions are correct: those with a reward above 0.5.

    The function gets what TRL's trainer gives it: `prompts`, `completions` (conversations where the prompt is one),
    `completion_ids` and every other column as a list, besides `log_metric` and `log_extra`, which do nothing here.

    Args:
        reward (`Callable`): from [`load_reward`].
        rows (`list[dict]`, of length B): the problem of each completion.
        texts (`list[str]`, of length B): completions.
        ids (`list[list[int]]`, of length B): their tokens.

    Raises:
        InputError: if the function raises, or does not return one finite number per completion.
    """
    columns = dict.fromkeys(
        key for row in rows for key in row if key not in ("prompt", "completion", "completion_ids")
    )
    completions = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    name = reward_name(reward)
    rewards = checked_reward(reward, name)(
        prompts=[row["prompt"] for row in rows],
        completions=completions,
        completion_ids=ids,
        log_metric=_ignore,
        log_extra=_ignore,
        **{key: [row.get(key) for row in rows] for key in columns},
    )
    if inspect.isawaitable(rewards):
        rewards = asyncio.run(rewards)
    if None in rewards:
        row = rows[rewards.index(None)]
        raise InputError(
            f"The reward function {name!r} returned None for prompt_id {row['prompt_id']!r}: evaluation needs a verdict on "
            "every problem. Leave out the problems it does not apply to."
        )
    return [value > CORRECT_ABOVE for value in rewards]


def _ignore(*args: Any) -> None:
    """Stands in for the logging functions of TRL's trainer."""
