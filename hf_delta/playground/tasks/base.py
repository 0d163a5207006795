"""What a task family is: named levels, and a way to draw a problem of a level."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from zlib import crc32


HELD_OUT_SHARE = 5  # one problem in five


@dataclass(frozen=True)
class Level:
    """One difficulty of a task.

    Args:
        name (`str`): what the data files, the metrics and the tables call it.
        share (`float`): how often pre-training draws it, relative to the other levels.
        care (`float`): the fraction of pre-training demonstrations that are `careful`; the others are `sloppy`.
    """

    name: str
    share: float
    care: float


@dataclass(frozen=True)
class Problem:
    """One problem with its answer and the two ways of answering it that pre-training shows.

    Args:
        level (`str`): name of the level.
        expression (`str`): the problem itself, such as `345+678`; it decides the split and names the problem.
        answer (`str`): what must come after the last `#` of a response.
        careful (`str`): a response with its working, right by construction.
        sloppy (`str`): a response that guesses or works with mistakes, wrong as a rule.
    """

    level: str
    expression: str
    answer: str
    careful: str
    sloppy: str

    @property
    def prompt(self) -> str:
        return f"{self.expression}:"

    @property
    def held_out(self) -> bool:
        """Whether the problem is kept for evaluation: a function of the expression alone, so the same for every seed."""
        return crc32(self.expression.encode()) % HELD_OUT_SHARE == 0


class Task(ABC):
    """A family of problems; subclass it in one file, set the three attributes and write `sample`.

    Attributes:
        name (`str`): first part of every `prompt_id`.
        alphabet (`str`): every character that prompts and responses use; one token each.
        levels (`tuple[Level, ...]`): from easy to hard.
    """

    name: str
    alphabet: str = "0123456789+-*=;:#"
    levels: tuple[Level, ...]

    @abstractmethod
    def sample(self, level: str, rng: Random) -> Problem:
        """Draws one problem of the level, taking every random number from `rng`."""
