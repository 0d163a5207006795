"""What the playground says of responses beyond right and wrong: weights of tokens, and lists from right to far off."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from hf_delta.playground.rewards import playground_digit_reward
from hf_delta.playground.tasks import Problem


# Of a token of the working, where one of the answer has 1.
WORKING_WEIGHT = 0.5
# Most responses of a list.
LISTED = 4


def token_weights(response: str) -> list[float]:
    """One weight for each token of a response, its end included: 0.5 for the working, 1 from the last `#` on.

    A token is a character.
    """
    working, mark, answer = response.rpartition("#")
    return [WORKING_WEIGHT] * len(working) + [1.0] * (len(mark + answer) + 1)


def listed(problems: Sequence[Problem], rng: Random) -> Iterator[tuple[Problem, dict[str, Any]]]:
    """`completions` and `scores` for each problem: four responses in random order, and [`playground_digit_reward`] of each.

    The careful response, the same with one wrong character in its final answer and with nothing but wrong ones, and the sloppy
    one. Where the characters of all answers are too few for these to differ, there are fewer.
    """
    letters = sorted({letter for problem in problems for letter in _answer(problem)})
    for problem in problems:
        length = len(_answer(problem))
        wrong = [_slipped(problem, count, letters, rng) for count in (1, length)]
        completions = list(dict.fromkeys([problem.careful, *wrong, problem.sloppy]))
        rng.shuffle(completions)
        scores = playground_digit_reward(completions, [problem.answer] * len(completions))
        yield problem, {"completions": completions, "scores": scores}


def _answer(problem: Problem) -> str:
    return problem.careful.rpartition("#")[2]


def _slipped(problem: Problem, count: int, letters: Sequence[str], rng: Random) -> str:
    """The careful response with `count` characters of its answer replaced by other ones."""
    working, mark, answer = problem.careful.rpartition("#")
    characters = list(answer)
    for place in rng.sample(range(len(answer)), count):
        others = [letter for letter in letters if letter != answer[place]]
        characters[place] = rng.choice(others) if others else answer[place]
    return "".join([working, mark, *characters])
