"""Two evaluations of the same problems side by side."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hf_delta.errors import InputError
from hf_delta.evaluation.estimates import Estimate, difference_estimate, weighted_estimate
from hf_delta.evaluation.report import Example, Report, Summary, interval_text


# These do not change what is measured, only the draws.
_MAY_DIFFER = ("batch_size", "seed")
_SHOWN = 400  # characters of a text
_CHOICE = (
    "Three held-out problems, taken at one sixth, one half and five sixths of the stored ones from the first level to the "
    "last, with the first completion of each: chosen by position before anything was sampled, not by outcome."
)


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a level or a mean, at one k."""

    k: int
    name: str
    before: float
    after: float
    difference: Estimate  # after - before, paired over problems


@dataclass(frozen=True)
class Comparison:
    """`before` and `after` on the same problems with the same settings.

    Raises:
        InputError: if the problems or settings of the two are different.
    """

    before: Report
    after: Report

    def __post_init__(self) -> None:
        if self.before.fingerprint != self.after.fingerprint:
            raise InputError(
                "The two evaluations are of different problems "
                f"({self.before.source.get('data', 'data')} with fingerprint {self.before.fingerprint}, "
                f"{self.after.source.get('data', 'data')} with {self.after.fingerprint}): evaluate both on one file."
            )
        old, new = self.before.settings, self.after.settings
        for key in sorted(old.keys() | new.keys()):
            if key not in _MAY_DIFFER and old.get(key) != new.get(key):
                raise InputError(
                    f"The two evaluations have different {key} ({old.get(key)} and {new.get(key)}): evaluate both alike."
                )

    @cached_property
    def rows(self) -> list[Row]:
        """Levels and, if there is more than one, their mean and the mean of problems; k by k."""
        rows = []
        for k in self.before.settings["ks"]:
            pairs = [(level, self._difference(k, level.name)) for level in self.before.levels]
            rows += [self._row(k, old, new, d) for (old, d), new in zip(pairs, self.after.levels, strict=True)]
            if len(pairs) > 1:
                differences = [difference for _, difference in pairs]
                sizes = [level.problems for level in self.before.levels]
                ones = [1] * len(sizes)
                for name, weights in (("over_levels", ones), ("over_problems", sizes)):
                    old, new = getattr(self.before, name), getattr(self.after, name)
                    rows.append(self._row(k, old, new, weighted_estimate(differences, weights)))
        return rows

    @cached_property
    def examples(self) -> list[tuple[Example, Example]]:
        """Three problems, or all if fewer are stored, before and after; chosen by position."""
        after = {example.prompt_id: example for example in self.after.examples}
        both = [(example, after[example.prompt_id]) for example in self.before.examples if example.prompt_id in after]
        count = min(3, len(both))
        return [both[(2 * third + 1) * len(both) // (2 * count)] for third in range(count)]

    def table(self) -> Table:
        """Before, after and difference with its 95 % interval, per level and k; mean lengths with the first k."""
        table = Table(
            box=box.SIMPLE, pad_edge=False, title="Held-out problems before and after, paired 95 % intervals"
        )
        for number, header in enumerate(_HEADER):
            table.add_column(header, justify="left" if number < 2 else "right", no_wrap=True)
        rows = self._cells()
        for index, cells in enumerate(rows):
            table.add_row(*cells, end_section=index + 1 < len(rows) and rows[index + 1][0] != cells[0])
        return table

    def examples_table(self) -> Table:
        """The held-out problems with what was answered before and after."""
        table = Table(box=box.SIMPLE, title="Three held-out problems, chosen by position", show_lines=True)
        for header in ("level", "problem", "answer", "before", "after"):
            table.add_column(header, overflow="fold")
        for old, new in self.examples:
            answers = [Text(f"{_clip(e.completion)}  {_verdict(e)}") for e in (old, new)]
            table.add_row(
                Text(old.level), Text(_clip(_prompt_text(old.prompt))), Text(_clip(str(old.answer))), *answers
            )
        return table

    def markdown(self) -> str:
        """The table and the examples as Markdown, with how they came about."""
        settings = self.before.settings
        lines = [
            "## Held-out problems before and after",
            "",
            f"{len(self.before.problems)} problems, {settings['samples']} samples each at temperature "
            f"{settings['temperature']}, at most {settings['max_new_tokens']} new tokens, judged by `{settings['reward']}`. "
            "Differences are paired over problems, with 95 % intervals.",
            "",
            "| " + " | ".join(_HEADER) + " |",
            "|" + " --- |" * 2 + " ---: |" * (len(_HEADER) - 2),
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in self._cells()),
            "",
        ]
        if self.examples:
            lines += ["## Three answers" if len(self.examples) == 3 else "## Answers", "", _CHOICE, ""]
            for pair in self.examples:
                lines += [*_example_block(*pair), ""]
        return "\n".join(lines)

    def _cells(self) -> list[tuple[str, ...]]:
        lengths = {}
        summaries = [(self.before.levels, self.after.levels)]
        summaries += [([getattr(self.before, n)], [getattr(self.after, n)]) for n in ("over_levels", "over_problems")]
        for olds, news in summaries:
            for old, new in zip(olds, news, strict=True):
                lengths[old.name] = f"{old.mean_length:.1f} → {new.mean_length:.1f}"
        first = self.before.settings["ks"][0]
        return [
            (
                f"pass@{row.k}",
                row.name,
                f"{row.before:.2f}",
                f"{row.after:.2f}",
                interval_text(row.difference, "+"),
                lengths[row.name] if row.k == first else "",
            )
            for row in self.rows
        ]

    def _difference(self, k: int, level: str) -> Estimate:
        return difference_estimate(self.before.values(k, level), self.after.values(k, level))

    @staticmethod
    def _row(k: int, before: Summary, after: Summary, difference: Estimate) -> Row:
        return Row(k, before.name, before.pass_at_k[k].mean, after.pass_at_k[k].mean, difference)


def comparison_report(before: Report, after: Report) -> tuple[Table, str]:
    """A table for the terminal and a Markdown text, see [`Comparison`].

    Raises:
        InputError: if the problems or settings of the two are different.
    """
    comparison = Comparison(before, after)
    return comparison.table(), comparison.markdown()


_HEADER = ("", "level", "before", "after", "difference", "tokens")


def _verdict(example: Example) -> str:
    return "(correct)" if example.correct else "(wrong)"


def _clip(text: str) -> str:
    # The end stays, because the answer stands there.
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]} … {text[-half:]}"


def _prompt_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def _example_block(old: Example, new: Example) -> list[str]:
    parts = {
        "level": old.level,
        "problem": _clip(_prompt_text(old.prompt)),
        "answer": _clip(str(old.answer)),
        "before": f"{_clip(old.completion)}  {_verdict(old)}",
        "after": f"{_clip(new.completion)}  {_verdict(new)}",
    }
    lines = [f"{name:<9}" + text.replace("\n", "\n" + " " * 9) for name, text in parts.items()]
    # Longer than any run of backticks inside, so that none can end the block.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", "\n".join(lines)))])
    return [fence + "text", *lines, fence]
