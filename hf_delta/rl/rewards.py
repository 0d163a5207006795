"""Checks around reward functions: one clear error where a silent zero or a stack of foreign frames would be."""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from hf_delta.errors import InputError, said_by


# Our own reward functions, by the name that recipes and commands use; one line each.
NAMED_REWARDS = {
    "playground_reward": "hf_delta.playground.rewards.playground_reward",
    "playground_digit_reward": "hf_delta.playground.rewards.playground_digit_reward",
}


def checked_reward(function: Callable, name: str) -> Callable:
    """Wrap a reward function so that what it raises or returns is reported with its name and the row.

    TRL reads NaN as "no score", the meaning of `None`; here NaN and infinities are errors, and `None` keeps its meaning.
    Reward models (`torch.nn.Module`) are returned as they are.

    Raises (when called):
        `InputError`: the function raised, returned another number of rewards than completions, or a reward is not finite.
    """
    if isinstance(function, torch.nn.Module):
        return function

    if _is_async(function):

        async def call(**kwargs: Any) -> list[float | None]:
            try:
                rewards = await function(**kwargs)
            except (Exception, SystemExit) as error:
                raise _raised(name, error) from error
            return _checked(name, rewards, kwargs)

    else:

        def call(**kwargs: Any) -> list[float | None]:
            try:
                rewards = function(**kwargs)
            except (Exception, SystemExit) as error:
                raise _raised(name, error) from error
            return _checked(name, rewards, kwargs)

    # A functools.partial or an instance has no __name__ to copy, hence not functools.wraps alone.
    return functools.update_wrapper(call, function)


def _is_async(function: Callable) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _raised(name: str, error: BaseException) -> InputError:
    return InputError(f"The reward function {name!r} raised {said_by(error)}.")


def _checked(name: str, rewards: Any, kwargs: dict[str, Any]) -> list[float | None]:
    completions = kwargs["completions"]
    try:
        if isinstance(rewards, (str, dict)):
            raise TypeError
        rewards = list(rewards)
    except TypeError as error:
        raise InputError(
            f"The reward function {name!r} returned {type(rewards).__name__}; it must return a list with one reward per "
            "completion."
        ) from error
    if len(rewards) != len(completions):
        raise InputError(
            f"The reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions; it must "
            "return one reward per completion."
        )
    for row, reward in enumerate(rewards):
        if reward is not None and not _is_finite(reward):
            shown = "a number that is too large" if type(reward) is int else repr(reward)
            raise InputError(
                f"The reward function {name!r} returned {shown} for the completion {completions[row]!r} of the "
                f"prompt {kwargs['prompts'][row]!r}. Return a finite number, or None where the function does not apply."
            )
    return rewards


def _is_finite(reward: Any) -> bool:
    try:
        return math.isfinite(reward)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # text, a list, a tensor of several numbers, 10**400
        return False


_ROUNDING = 1e-4


def correct_rollouts(
    rewards: torch.Tensor,
    reward: torch.Tensor,
    names: list[str],
    threshold: float | None = None,
    judge: str | None = None,
    strict: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rollouts are judged, and which of them are correct: the reward, or that of one function, is above the threshold.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`): What each function returned, NaN where it returned `None`.
        reward (`torch.Tensor` of shape `(N,)`): Their weighted sum.
        names (`list[str]` of length F): Names of the functions.
        threshold (`float`, *optional*): 0.5 by default.
        judge (`str`, *optional*): The function that decides; the weighted sum by default.
        strict (`bool`, *optional*, defaults to `False`): Whether without a threshold rewards must lie in [0, 1].

    Returns:
        Two `torch.Tensor` of shape `(N,)`, bool: whether there is a score to judge by, and whether it is above.

    Raises:
        `InputError`: nothing says from which reward on a rollout is correct.
    """
    values, what = reward, "The weighted sum of rewards"
    if judge is not None:
        values, what = rewards[:, names.index(judge)], f"The reward of {judge}"
    judged = ~values.isnan()
    known = values[judged]
    # Weighted sums of right answers miss 1 by rounding.
    if strict and threshold is None and bool(((known < -_ROUNDING) | (known > 1 + _ROUNDING)).any()):
        low, high = known.min().item(), known.max().item()
        found = f"lies between {low:g} and {high:g}" if low < high else f"is {low:g}"
        raise InputError(
            f"{what} {found}, and pass rates need to know what is "
            "correct. Write correct_threshold, or in correct_reward_func the name of a function that returns 0 or 1."
        )
    return judged, values > (0.5 if threshold is None else threshold)
