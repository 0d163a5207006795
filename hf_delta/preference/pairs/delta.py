"""What sets chosen apart from rejected: measured before anything is trained on it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.errors import InputError
from hf_delta.evaluation.estimates import (
    Estimate,
    difference_estimate,
    mean_estimate,
    unbounded_mean_estimate,
)
from hf_delta.evaluation.report import interval_text
from hf_delta.evaluation.sampling import undisturbed
from hf_delta.evaluation.scoring import judge
from hf_delta.preference.pairs.assemble import Pairs
from hf_delta.preference.pairs.generate import check_tokens
from hf_delta.preference.pairs.logps import mean_logp, pair_tokens


# Two passes of the student each; the interval says how far the mean of so many can be trusted.
STUDENT_PAIRS = 512


@dataclass(frozen=True)
class Measure:
    """One quantity of both answers over the pairs, with 95 % intervals; the difference is paired."""

    pairs: int
    chosen: Estimate
    rejected: Estimate
    difference: Estimate  # chosen - rejected


@dataclass(frozen=True)
class Delta:
    """The delta of a set of pairs.

    Attributes:
        tokens ([`Measure`]): length of the texts, both in tokens of one tokenizer, without special tokens.
        cut ([`Measure`]): share that ended at `max_new_tokens`.
        accuracy ([`Measure`], *optional*): share that the reward function calls correct.
        outcomes (`dict[str, int]`, *optional*): pairs by which answers are correct: `only chosen`, `only rejected`, `both`,
            `neither`.
        logps ([`Measure`], *optional*): mean log-probability per token under the student, nats, each answer counting once.
    """

    tokens: Measure
    cut: Measure
    accuracy: Measure | None = None
    outcomes: dict[str, int] | None = None
    logps: Measure | None = None

    @property
    def length_ratio(self) -> float:
        """Mean length of chosen over mean length of rejected, in tokens."""
        return self.tokens.chosen.mean / self.tokens.rejected.mean if self.tokens.rejected.mean else math.inf

    def warnings(self) -> list[str]:
        """One sentence for each way in which the delta points away from better answers, or is not shown to point to them."""
        found = []
        if self.accuracy is not None:
            difference = self.accuracy.difference
            text = interval_text(difference, "+")
            if difference.mean < 0:
                found.append(
                    f"the delta goes the wrong way: rejected answers are correct more often than chosen ones, by {text}. Are "
                    "--strong and --weak exchanged?"
                )
            elif difference.low <= 0:
                found.append(f"chosen answers are not shown to be correct more often: the difference is {text}.")
        if self.tokens.difference.mean < 0:
            found.append(
                f"the delta goes the wrong way in length: chosen answers have {self.length_ratio:.2f} times the tokens of "
                "rejected ones. A student may learn to say less."
            )
        return found

    def table(self) -> Table:
        """Means of chosen and rejected and their difference with its 95 % interval."""
        table = Table(box=box.SIMPLE, title=f"The delta of {self.tokens.pairs} pairs, 95 % intervals")
        for number, header in enumerate(("", "chosen", "rejected", "difference")):
            table.add_column(header, justify="right" if number else "left", no_wrap=True)
        table.add_row("length (tokens)", *_cells(self.tokens))
        table.add_row("length ratio", "", "", f"{self.length_ratio:.2f}")
        table.add_row("cut off", *_cells(self.cut))
        if self.accuracy is not None:
            table.add_row("accuracy", *_cells(self.accuracy))
            for name, count in self.outcomes.items():
                table.add_row(f"  {name} correct", "", "", f"{count} pairs")
        if self.logps is not None:
            table.add_row("log-prob. per token", *_cells(self.logps))
            table.add_row("  under the student", "", "", f"{self.logps.pairs} pairs")
        return table

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinities: the interval of a single pair is `null`."""
        return _finite({**asdict(self), "length_ratio": self.length_ratio})


def measure_delta(
    pairs: Pairs,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: Callable | None = None,
    student: PreTrainedModel | None = None,
    progress: bool = True,
) -> Delta:
    """Length, accuracy and log-probabilities of the two answers, each pair counting once.

    Args:
        pairs ([`Pairs`]): at least one.
        tokenizer: of the student; in its tokens lengths are counted.
        reward (`Callable`, *optional*): in TRL's form; above 0.5 is correct.
        student: model to be trained on the pairs. It scores at most 512 of them, evenly spread.
        progress (`bool`): whether to show a bar while the student scores.

    Raises:
        InputError: the reward function cannot judge an answer, or the student computes NaN or lacks a token.
    """
    sides = [[_text(row[key]) for row in pairs.rows] for key in ("chosen", "rejected")]
    ids = [tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in sides]
    tokens = _measure(*([len(tokens) for tokens in side] for side in ids))
    cut = _share(*([response.cut for response in side] for side in (pairs.strong, pairs.weak)))
    accuracy = outcomes = None
    if reward is not None:
        columns = [{key: row[key] for key in row if key not in ("chosen", "rejected")} for row in pairs.rows]
        verdicts = [judge(reward, columns, texts, tokens) for texts, tokens in zip(sides, ids)]
        accuracy, outcomes = _share(*verdicts), _outcomes(*verdicts)
    logps = None if student is None else _measure(*_student_logps(student, tokenizer, pairs.rows, progress))
    return Delta(tokens, cut, accuracy, outcomes, logps)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` positions, or all, at equal distances: positions decide, not what is there."""
    wanted = min(count, wanted)
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


def _student_logps(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], progress: bool
) -> tuple[list[float], list[float]]:
    chosen, rejected = [], []
    scored = [rows[position] for position in spread(len(rows), STUDENT_PAIRS)]
    bar = tqdm(scored, desc="student: log-probabilities", unit="pair", disable=not progress)
    with undisturbed(student, seed=0), bar:
        for row in bar:
            try:
                prompt, *answers = pair_tokens(tokenizer, row)
            except InputError as error:
                raise InputError(f"--student: {error}") from error
            for values, answer in zip((chosen, rejected), answers):
                check_tokens(student, [*prompt, *answer], "--student")
                values.append(mean_logp(student, prompt, answer))
                if not math.isfinite(values[-1]):
                    raise InputError(
                        f"--student: the log-probability of an answer to prompt_id {row['prompt_id']!r} is {values[-1]}: its "
                        "weights are damaged, or overflow in their dtype."
                    )
    return chosen, rejected


def _measure(chosen: Sequence[float], rejected: Sequence[float]) -> Measure:
    differences = [a - b for a, b in zip(chosen, rejected, strict=True)]
    return Measure(len(chosen), *map(unbounded_mean_estimate, (chosen, rejected, differences)))


def _share(chosen: Sequence[bool], rejected: Sequence[bool]) -> Measure:
    difference = difference_estimate(rejected, chosen)
    return Measure(len(chosen), mean_estimate(chosen), mean_estimate(rejected), difference)


def _outcomes(chosen: Sequence[bool], rejected: Sequence[bool]) -> dict[str, int]:
    both = list(zip(chosen, rejected))
    kinds = {
        "only chosen": (True, False),
        "only rejected": (False, True),
        "both": (True, True),
        "neither": (False, False),
    }
    return {name: both.count(kind) for name, kind in kinds.items()}


def _text(reply: str | list[dict[str, str]]) -> str:
    return reply if isinstance(reply, str) else reply[-1]["content"]


def _cells(measure: Measure) -> tuple[str, str, str]:
    means = (f"{estimate.mean:.2f}" for estimate in (measure.chosen, measure.rejected))
    return (*means, interval_text(measure.difference, "+"))


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
