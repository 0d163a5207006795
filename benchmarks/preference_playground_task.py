"""The task of `preference_playground.py`: sums with irrelevant characters between the columns, learnt from a faulty teacher.

`47+85:` is answered by `7512-+*=4813;=-+#132`: a column is two digits, the carry and the digit that stays, as in the playground's
other families; after each column come `FILLERS` characters that mean nothing, each drawn evenly from `FILLER`. The teacher of
pre-training says a wrong digit for some sums of two digits and a carry, always the same wrong one, with a chance of its own; carries
are always right. A mistake therefore is in exactly two characters, the digit of its column and that digit of the sum.
"""

from collections.abc import Collection
from random import Random

from hf_delta.playground import Level, Problem, Task


FILLER = "+-*=;"
FILLERS = 4
# Lowest and highest chance that the teacher says the wrong digit: without and with a carry coming in.
ERROR_RATES = ((0.0, 0.3), (0.4, 0.9))


def table_of_mistakes() -> dict[tuple[int, int, int], tuple[float, int]]:
    """(smaller digit, larger digit, carry in) -> (chance of a mistake, the wrong digit); the same in every process."""
    rng = Random("the mistakes of filled sums")
    table = {}
    for x in range(10):
        for y in range(x, 10):
            for carry, (lowest, highest) in enumerate(ERROR_RATES):
                wrong = rng.choice([digit for digit in range(10) if digit != (x + y + carry) % 10])
                table[x, y, carry] = (lowest + (highest - lowest) * rng.random(), wrong)
    return table


MISTAKES = table_of_mistakes()


class FilledSums(Task):
    """`fill1` to `fill4`: sums of two numbers with as many digits."""

    name = "filled_sums"
    levels = tuple(Level(f"fill{digits}", share=1, care=0.0) for digits in range(1, 5))

    def sample(self, level: str, rng: Random) -> Problem:
        digits = int(level.removeprefix("fill"))
        low = 10 ** (digits - 1) if digits > 1 else 0
        a, b = rng.randrange(low, 10**digits), rng.randrange(low, 10**digits)
        rates = error_rates(a, b, digits)
        taught = {place for place in range(digits) if rng.random() < rates[place]}
        return Problem(level, f"{a}+{b}", str(a + b), written(a, b, digits, rng), written(a, b, digits, rng, taught))


def error_rates(a: int, b: int, digits: int) -> list[float]:
    """How often the teacher is wrong in each column, units first."""
    return [MISTAKES[key][0] for _, _, key, _ in _columns(a, b, digits)]


def written(a: int, b: int, digits: int, rng: Random, wrong: Collection[int] = ()) -> str:
    """The written sum with fresh irrelevant characters, and with the teacher's mistakes in the columns `wrong`, units first."""
    parts, total, carry = [], "", 0
    for place, (x, y, key, (carry, digit)) in enumerate(_columns(a, b, digits)):
        digit = MISTAKES[key][1] if place in wrong else digit
        parts.append(f"{x}{y}{carry}{digit}{''.join(rng.choices(FILLER, k=FILLERS))}")
        total = f"{digit}{total}"
    return f"{''.join(parts)}#{carry}{total}"


def decisive_places(place: int, digits: int) -> tuple[int, int]:
    """Where a mistake in a column shows in the written sum: the digit of the column, and that digit of the sum."""
    column = 4 + FILLERS
    # After the columns come `#` and the last carry.
    return place * column + 3, digits * column + 2 + digits - 1 - place


def filler_places(digits: int) -> list[int]:
    """Where the irrelevant characters are in the written sum."""
    column = 4 + FILLERS
    return [start + offset for start in range(0, digits * column, column) for offset in range(4, column)]


def _columns(a: int, b: int, digits: int) -> list[tuple[int, int, tuple[int, int, int], tuple[int, int]]]:
    """Both digits, the key of the table, and the right carry and digit of each column, units first."""
    found, carry = [], 0
    for _ in range(digits):
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        key = (min(x, y), max(x, y), carry)
        carry, digit = divmod(x + y + carry, 10)
        found.append((x, y, key, (carry, digit)))
    return found
