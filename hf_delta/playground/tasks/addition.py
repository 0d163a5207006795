"""Adding two numbers of equally many digits, column by column."""

from random import Random

from hf_delta.playground.tasks.base import Level, Problem, Task


class Addition(Task):
    """`add1` to `add6`: n-digit plus n-digit addition whose careful answers write down every column.

    A column is four characters: the two digits, the carry it produces and the digit it leaves, from the right;
    then comes `#` and the sum with n + 1 digits. `345+678:` is answered by `5813;4712;3610#1023`, and guessed by
    repeating the first number: `#345`.
    """

    name = "addition"
    levels = (
        Level("add1", share=22, care=0.95),
        Level("add2", share=22, care=0.85),
        Level("add3", share=19, care=0.70),
        Level("add4", share=15, care=0.55),
        Level("add5", share=12, care=0.40),
        Level("add6", share=10, care=0.30),
    )

    def sample(self, level: str, rng: Random) -> Problem:
        digits = int(level.removeprefix("add"))
        low = 10 ** (digits - 1) if digits > 1 else 0
        a, b = rng.randrange(low, 10**digits), rng.randrange(low, 10**digits)
        return Problem(
            level=level,
            expression=f"{a}+{b}",
            answer=str(a + b),
            careful=f"{';'.join(columns(a, b, digits))}#{a + b:0{digits + 1}d}",
            sloppy=f"#{a}",
        )


def columns(a: int, b: int, digits: int) -> list[str]:
    """The columns of a written addition, units first."""
    written, carry = [], 0
    for _ in range(digits):
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        carry, digit = divmod(x + y + carry, 10)
        written.append(f"{x}{y}{carry}{digit}")
    return written
