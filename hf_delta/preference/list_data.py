"""Rows with a list of completions: checking, labels, batches.

A row has `prompt`, `completions` (2 or more; all texts, or all lists of messages as the prompt is) and, one for each completion,
either `scores` (higher is better) or `ranks` (lower is better, equal ranks are ties).
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from datasets import IterableDataset

from hf_delta.errors import InputError


Rows = TypeVar("Rows", bound=Iterable[Mapping[str, Any]])


def check_list_rows(rows: Rows, source: str = "the dataset", *, rescale: bool = True) -> Rows:
    """Refuse the first row that is no list.

    Args:
        rows (`Dataset`, `IterableDataset`, or iterable of `dict`): Rows.
        source (`str`, *optional*): What to call them in messages.
        rescale (`bool`, *optional*, defaults to `True`): See [`add_labels`].

    Returns:
        The rows; of an `IterableDataset` another one, which checks the rows as they come by.

    Raises:
        `InputError`: with the number of the row, counted from 1, and the key: no prompt; fewer than 2 completions; an empty
            one, one that is there twice, one that is no text or messages; neither or both of `scores` and `ranks`, not one
            for each completion, one that is not a finite number, or, without `rescale`, a score outside [0, 1].
    """
    if isinstance(rows, IterableDataset):
        options = {"source": source, "rescale": rescale}
        return rows.map(_checked, with_indices=True, fn_kwargs=options, features=rows.features)
    index = -1
    for index, row in enumerate(rows):
        _checked(row, index, source, rescale)
    if index < 0:
        raise InputError(f"{source} has no rows.")
    return rows


def _checked(row: Mapping[str, Any], index: int, source: str, rescale: bool) -> Mapping[str, Any]:
    where = f"{source}, row {index + 1}"
    check_prompt(row, where)
    _check_completions(row, where)
    _check_values(row, where, rescale)
    return row


def list_labels(scores: Sequence[float]) -> list[float]:
    """Labels in [0, 1] from scores: `psi_i = (score_i - min) / (max - min)` within the list, all 0.5 where all are equal.

    Args:
        scores (`Sequence[float]` of length `K`): Finite.

    Returns:
        `list[float]` of length `K`.
    """
    # Halves, because the distance between two finite numbers may be none.
    halves = [score / 2 for score in scores]
    low, high = min(halves), max(halves)
    if low == high:
        return [0.5] * len(halves)
    return [(half - low) / (high - low) for half in halves]


def rank_scores(ranks: Sequence[float]) -> list[float]:
    """Scores from ranks: the share of the list that a completion beats, `(worse + equal / 2) / K`, itself among the equal.

    LiPO's mean win rate for a judge that knows the order and nothing else.

    Args:
        ranks (`Sequence[float]` of length `K`): Lower is better.
    """
    return [sum((other > rank) + 0.5 * (other == rank) for other in ranks) / len(ranks) for rank in ranks]


def add_labels(row: Mapping[str, Any], *, rescale: bool = True) -> dict[str, Any]:
    """A row with `list_labels`, `K` floats in [0, 1], from its `scores` or `ranks`; for `datasets.Dataset.map`.

    LiPO's labels are mean win rates of a pairwise judge: in [0, 1], and used as `2^psi`. Scores may be on any scale. Rescaled
    ([`list_labels`]), the best of a list gets 1 and the worst 0, so that neither the unit nor the zero of the scale matters,
    and two completions have the labels {1, 0} with which every list loss is DPO's times a constant. What is lost is how far
    apart a list's ends are: a list of near-equals then counts like any other.

    Args:
        row (`dict`): A row that [`check_list_rows`] let pass.
        rescale (`bool`, *optional*, defaults to `True`): Whether to spread each list over [0, 1]. Without, scores are the
            labels, as for win rates like the paper's, and ranks become such win rates ([`rank_scores`]).
    """
    scores = row.get("scores")
    if scores is None:
        scores = rank_scores(row["ranks"])
    return {**row, "list_labels": list_labels(scores) if rescale else [float(score) for score in scores]}


@dataclass
class DataCollatorForLists:
    """One padded batch of all completions of several lists, as TRL's `DataCollatorForPreference` makes it of pairs.

    Each example has `prompt_ids` (`list[int]`), `completion_ids` (`list[list[int]]`, `K` of them) and `list_labels` (`K` floats).
    Examples may differ in `K`.

    The batch holds, with `N` completions in all, list by list, `B` lists and the longest of `K` completions:

    - `input_ids`, `attention_mask`, `completion_mask` `(N, T)` int64: prompt and completion, padded on the right;
    - `list_mask` `(B, K)` bool: which entries are there, see [`~hf_delta.preference.lists.into_lists`];
    - `list_labels` `(B, K)` float32: 0 in entries that are not there.

    Args:
        pad_token_id (`int`):
            Token to pad with.
        max_length (`int`, *optional*):
            Longest sequence of prompt and completion, in tokens; longer ones are cut before padding.
        truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            Which end of a longer one to keep: `"keep_start"` or `"keep_end"`.
        pad_to_multiple_of (`int`, *optional*):
            Pad to a multiple of this.

    Raises:
        `InputError`: an unknown `truncation_mode`.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self):
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise InputError(f"truncation_mode must be keep_start or keep_end, got {self.truncation_mode!r}.")

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sequences, masks, lengths = [], [], []
        for example in examples:
            prompt = example["prompt_ids"]
            lengths.append(len(example["completion_ids"]))
            for completion in example["completion_ids"]:
                sequences.append(self._cut([*prompt, *completion]))
                masks.append(self._cut([0] * len(prompt) + [1] * len(completion)))
        counts = torch.tensor(lengths)
        list_mask = torch.arange(max(lengths)) < counts.unsqueeze(1)
        labels = torch.tensor([label for example in examples for label in example["list_labels"]], dtype=torch.float32)
        return {
            "input_ids": self._padded(sequences, self.pad_token_id),
            "attention_mask": self._padded([[1] * len(sequence) for sequence in sequences], 0),
            "completion_mask": self._padded(masks, 0),
            "list_mask": list_mask,
            "list_labels": torch.zeros(list_mask.shape).masked_scatter(list_mask, labels),
        }

    def _cut(self, values: list[int]) -> list[int]:
        if self.max_length is None:
            return values
        return values[: self.max_length] if self.truncation_mode == "keep_start" else values[-self.max_length :]

    def _padded(self, rows: list[list[int]], value: int) -> torch.Tensor:
        length, multiple = max(map(len, rows)), self.pad_to_multiple_of or 1
        length = math.ceil(length / multiple) * multiple
        return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.long)


def check_prompt(row: Mapping[str, Any], where: str) -> None:
    """Refuse a row whose `prompt` is missing, empty, or neither text nor messages; `where` names it."""
    prompt = row.get("prompt")
    if not (isinstance(prompt, str) or _is_messages(prompt)) or len(prompt) == 0:
        raise InputError(f"{where}: 'prompt' is {prompt!r:.80}; it must be text or a list of messages, and not empty.")


def _check_completions(row: Mapping[str, Any], where: str) -> None:
    completions = row.get("completions")
    if not isinstance(completions, list) or len(completions) < 2:
        found = f"{len(completions)} of them" if isinstance(completions, list) else repr(completions)[:80]
        raise InputError(f"{where}: 'completions' must be a list of 2 or more, got {found}. Remove rows with fewer.")
    first: dict[str, int] = {}
    for place, completion in enumerate(completions):
        check_text({**row, f"completions[{place}]": completion}, f"completions[{place}]", where)
        other = first.setdefault(text_key(completion), place)
        if other != place:
            raise InputError(f"{where}: 'completions[{other}]' and 'completions[{place}]' are equal; remove one.")


def check_text(row: Mapping[str, Any], key: str, where: str) -> None:
    """Refuse a row whose reply under `key` is missing, empty, or not of the kind (text, messages) of its `prompt`."""
    value = row.get(key)
    if not (isinstance(value, str) or _is_messages(value)):
        raise InputError(f"{where}: {key!r} is {value!r:.80}, which is neither text nor a list of messages.")
    if isinstance(value, str) != isinstance(row["prompt"], str):
        raise InputError(f"{where}: one of 'prompt' and {key!r} is text and the other messages; make both the same.")
    said = [value] if isinstance(value, str) else [m.get("content") or m.get("tool_calls") for m in value]
    if not any(said):
        raise InputError(f"{where}: {key!r} is empty; remove it.")


def _check_values(row: Mapping[str, Any], where: str, rescale: bool) -> None:
    given = [key for key in ("scores", "ranks") if row.get(key) is not None]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise InputError(f"{where} has {found} of 'scores' and 'ranks'; it must have one of them.")
    key, values, size = given[0], row[given[0]], len(row["completions"])
    if not isinstance(values, list) or len(values) != size:
        found = len(values) if isinstance(values, list) else repr(values)[:80]
        raise InputError(f"{where}: {key!r} must be one number for each of {size} completions, got {found}.")
    for place, value in enumerate(values):
        if not is_number(value):
            raise InputError(f"{where}: '{key}[{place}]' is {value!r}; it must be a finite number.")
        if key == "scores" and not rescale and not 0 <= value <= 1:
            raise InputError(f"{where}: '{key}[{place}]' is {value!r}; without rescaling, scores must be in [0, 1].")


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and message.get("role") for message in value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def text_key(value: Any) -> str:
    """One string for equal texts or equal messages, to find them by."""
    # Texts and messages do not meet: a text that looks like JSON gets quotes.
    return json.dumps(value, sort_keys=True, default=str)
