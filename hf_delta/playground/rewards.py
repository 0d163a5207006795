"""The verifiable rewards of the playground: is the final answer right, and how much of it?"""

import re
from collections.abc import Callable
from typing import Any


_INTEGER = re.compile(r"(-?)0*([0-9]+)")


def final_answer(text: str) -> str | None:
    """What follows the last `#`, without the leading zeros of an integer; `None` if there is no `#`."""
    _, mark, answer = text.rpartition("#")
    return _without_leading_zeros(answer) if mark else None


def playground_reward(
    completions: list[str] | list[list[dict[str, str]]],
    answer: list[Any],
    level: list[str] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 where the text after the last `#` of a completion is the answer, else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`, of length B): texts or conversations, as TRL passes them.
        answer (`list`, of length B): the right answers, text or numbers; `answer` of the playground's data files.
        level (`list[str]`, *optional*, of length B): with `log_metric`, the rewards are logged as `pass_rate/<level>`.
        log_metric (`Callable`, *optional*): TRL passes one and averages what it receives.
    """
    rewards = [
        float(final_answer(_text(completion)) == _without_leading_zeros(str(right)))
        for completion, right in zip(completions, answer, strict=True)
    ]
    if log_metric is not None and level is not None:
        for name, reward in zip(level, rewards, strict=True):
            log_metric(f"pass_rate/{name}", reward)
    return rewards


def playground_digit_reward(
    completions: list[str] | list[list[dict[str, str]]], answer: list[Any], **kwargs: Any
) -> list[float]:
    """The share of characters of the final answer that are right, each in its place counted from the right.

    Without leading zeros; of two lengths the longer one counts, so 1.0 means exactly what it means for
    [`playground_reward`]: the answer is right. A completion without `#` gets 0.0. On hard problems, where whole answers
    are hardly ever right, this reward still tells better from worse.

    Args:
        completions (`list[str]` or `list[list[dict]]`, of length B): texts or conversations, as TRL passes them.
        answer (`list`, of length B): the right answers, text or numbers; `answer` of the playground's data files.
    """
    return [
        _share_of_equal_characters(final_answer(_text(completion)), _without_leading_zeros(str(right)))
        for completion, right in zip(completions, answer, strict=True)
    ]


def _share_of_equal_characters(found: str | None, right: str) -> float:
    if found is None:
        return 0.0
    equal = sum(a == b for a, b in zip(reversed(found), reversed(right)))
    return equal / max(len(found), len(right), 1)


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else "".join(message["content"] or "" for message in completion)


def _without_leading_zeros(answer: str) -> str:
    integer = _INTEGER.fullmatch(answer)
    return "".join(integer.groups()) if integer else answer
