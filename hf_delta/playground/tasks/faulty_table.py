"""Adding two numbers of equally many digits, learnt from a teacher whose table of sums is partly wrong."""

from collections.abc import Callable
from random import Random

from hf_delta.playground.tasks.base import Level, Problem, Task


LARGEST_SUM = 19  # 9 + 9 + 1

# Lowest and highest chance that the teacher says the wrong sum: without and with a carry coming in.
ERROR_RATES = ((0.0, 0.2), (0.5, 0.9))


class FaultyTable(Task):
    """`sum1` to `sum6`: n-digit plus n-digit addition, always worked out, by a teacher who misremembers single sums.

    Problems and answers are written as in [`~hf_delta.playground.tasks.addition.Addition`]. For each of the 110 sums of
    two digits and a carry the teacher has one wrong value in mind and says it with a chance of its own, see
    [`faulty_sums`]; for most of the sums with a carry the wrong value is the likelier one. A mistake is carried on: what
    follows is right for the digits written so far. No answer is a guess, so a model gets better at this only by
    computing better.
    """

    name = "faulty_table"
    levels = (
        Level("sum1", share=18, care=0.0),
        Level("sum2", share=18, care=0.0),
        Level("sum3", share=17, care=0.0),
        Level("sum4", share=16, care=0.0),
        Level("sum5", share=16, care=0.0),
        Level("sum6", share=15, care=0.0),
    )

    def sample(self, level: str, rng: Random) -> Problem:
        digits = int(level.removeprefix("sum"))
        low = 10 ** (digits - 1) if digits > 1 else 0
        a, b = rng.randrange(low, 10**digits), rng.randrange(low, 10**digits)

        def recall(x: int, y: int, carry: int) -> int:
            error_rate, wrong = FAULTY_SUMS[min(x, y), max(x, y), carry]
            return wrong if rng.random() < error_rate else x + y + carry

        return Problem(
            level=level,
            expression=f"{a}+{b}",
            answer=str(a + b),
            careful=written(a, b, digits, lambda x, y, carry: x + y + carry),
            sloppy=written(a, b, digits, recall),
        )


def faulty_sums() -> dict[tuple[int, int, int], tuple[float, int]]:
    """(smaller digit, larger digit, carry in) -> (chance of a mistake, the wrong sum); the same in every process."""
    rng = Random("the faulty table")
    table = {}
    for x in range(10):
        for y in range(x, 10):
            for carry, (lowest, highest) in enumerate(ERROR_RATES):
                others = [value for value in range(LARGEST_SUM + 1) if value != x + y + carry]
                table[x, y, carry] = (lowest + (highest - lowest) * rng.random(), rng.choice(others))
    return table


def written(a: int, b: int, digits: int, add: Callable[[int, int, int], int]) -> str:
    """The written addition of two numbers, units first, by what `add` says of two digits and the carry."""
    columns, total, carry = [], "", 0
    for _ in range(digits):
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        carry, digit = divmod(add(x, y, carry), 10)
        columns.append(f"{x}{y}{carry}{digit}")
        total = f"{digit}{total}"
    return f"{';'.join(columns)}#{carry}{total}"


FAULTY_SUMS = faulty_sums()
