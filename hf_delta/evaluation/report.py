"""What an evaluation found, as a JSON file and as a table."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from hf_delta.errors import InputError
from hf_delta.evaluation.estimates import Estimate, mean_estimate, pass_at_k, weighted_estimate


FORMAT = "hf_delta.evaluation"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Problem:
    """What the completions of one problem came to."""

    prompt_id: str
    level: str
    samples: int
    correct: int
    truncated: int  # completions that max_new_tokens cut
    mean_length: float  # tokens, with the end-of-sequence token


@dataclass(frozen=True)
class Example:
    """The first completion of a problem, for people to read."""

    prompt_id: str
    level: str
    prompt: str | list[dict[str, Any]]
    answer: Any
    completion: str
    correct: bool


@dataclass(frozen=True)
class Summary:
    """A level, or the mean of all levels."""

    name: str
    problems: int
    samples: int
    pass_at_k: dict[int, Estimate]
    mean_length: float  # tokens
    truncated: float  # share of completions


@dataclass(frozen=True)
class Report:
    """Counts per problem, with what is derived from them on demand.

    Attributes:
        settings (`dict`): `ks`, `samples`, `temperature`, `max_new_tokens`, `reward`, `batch_size`, `seed`.
        fingerprint (`str`): of the problems; equal for equal problems.
        problems (`list[Problem]`): from the easiest level to the hardest, where the names of levels sort so.
        examples (`list[Example]`): some problems of each level, in the same order; chosen by position.
        source (`dict`): what was evaluated with which versions; nothing depends on it.
    """

    settings: dict[str, Any]
    fingerprint: str
    problems: list[Problem]
    examples: list[Example] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def levels(self) -> list[Summary]:
        """One summary per level."""
        by_level: dict[str, list[Problem]] = {}
        for problem in self.problems:
            by_level.setdefault(problem.level, []).append(problem)
        return [self._level(name, problems) for name, problems in by_level.items()]

    @cached_property
    def over_levels(self) -> Summary:
        """Mean of the levels, each counted once."""
        return _mean("level mean", self.levels, [1.0] * len(self.levels))

    @cached_property
    def over_problems(self) -> Summary:
        """Mean of the problems, each counted once; its interval takes the number of problems per level as given."""
        return _mean("problem mean", self.levels, [level.problems for level in self.levels])

    def values(self, k: int, level: str | None = None) -> np.ndarray:
        """pass@k of each problem (of a level), shape `(P,)`, in the order of `problems`."""
        chosen = [p for p in self.problems if level in (None, p.level)]
        return pass_at_k([p.samples for p in chosen], [p.correct for p in chosen], k)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the report as JSON; `docs/evaluation.md` has the schema.

        Raises:
            InputError: if the file exists and `overwrite` is false.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists: remove it, or choose another name for the report.")
        content = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "settings": self.settings,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "levels": [asdict(level) for level in self.levels],
            "over_levels": asdict(self.over_levels),
            "over_problems": asdict(self.over_problems),
            "problems": [asdict(problem) for problem in self.problems],
            "examples": [asdict(example) for example in self.examples],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Report":
        """Read what [`Report.save`] wrote.

        Raises:
            InputError: if the file is missing, damaged, something else, or in another version of the format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"The evaluation report {path} cannot be read ({error}): remove it, or evaluate again."
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is not an evaluation report of hf_delta.")
        if content.get("version") != FORMAT_VERSION:
            raise InputError(
                f"{path} is in report format {content.get('version')}, and this hf_delta reads format {FORMAT_VERSION}: "
                "evaluate again."
            )
        try:
            report = cls(
                settings=dict(content["settings"]),
                fingerprint=content["fingerprint"],
                problems=[Problem(**problem) for problem in content["problems"]],
                examples=[Example(**example) for example in content["examples"]],
                source=dict(content["source"]),
            )
            # The summaries in the file are for other readers; deriving them again checks the counts.
            _ = report.over_levels
        except (LookupError, TypeError, ValueError) as error:
            raise InputError(f"The evaluation report {path} is damaged ({error!r}): evaluate again.") from error
        return report

    def table(self) -> Table:
        """Level, number of problems n, pass@k with 95 % interval, mean length in tokens and share of truncated completions."""
        table = Table(box=box.SIMPLE, title=f"{self.settings['samples']} samples per problem, 95 % intervals")
        table.add_column("level", no_wrap=True)
        table.add_column("n", justify="right")
        for k in self.settings["ks"]:
            table.add_column(f"pass@{k}", justify="right", no_wrap=True)
        table.add_column("tokens", justify="right")
        table.add_column("cut", justify="right")
        rows = list(self.levels)
        if len(rows) > 1:
            rows += [self.over_levels, self.over_problems]
        for index, row in enumerate(rows):
            passes = [interval_text(row.pass_at_k[k]) for k in self.settings["ks"]]
            last = index == len(self.levels) - 1
            table.add_row(
                row.name,
                str(row.problems),
                *passes,
                f"{row.mean_length:.1f}",
                f"{row.truncated:.0%}",
                end_section=last,
            )
        return table

    def _level(self, name: str, problems: Sequence[Problem]) -> Summary:
        samples = sum(p.samples for p in problems)
        return Summary(
            name=name,
            problems=len(problems),
            samples=samples,
            pass_at_k={k: mean_estimate(self.values(k, name)) for k in self.settings["ks"]},
            mean_length=sum(p.mean_length * p.samples for p in problems) / samples,
            truncated=sum(p.truncated for p in problems) / samples,
        )


def interval_text(estimate: Estimate, sign: str = "") -> str:
    """`0.37 [0.28, 0.47]`, with `sign="+"` for differences."""
    return f"{estimate.mean:{sign}.2f} [{estimate.low:{sign}.2f}, {estimate.high:{sign}.2f}]"


def _mean(name: str, levels: Sequence[Summary], weights: Sequence[float]) -> Summary:
    return Summary(
        name=name,
        problems=sum(level.problems for level in levels),
        samples=sum(level.samples for level in levels),
        pass_at_k={
            k: weighted_estimate([level.pass_at_k[k] for level in levels], weights) for k in levels[0].pass_at_k
        },
        mean_length=float(np.average([level.mean_length for level in levels], weights=weights)),
        truncated=float(np.average([level.truncated for level in levels], weights=weights)),
    )
