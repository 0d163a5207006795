"""Lists of completions out of pairs, and out of scored samples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.preference.list_data import check_prompt, check_text, is_number, text_key


@dataclass(frozen=True)
class ConvertedLists:
    """What a conversion gave, and what it left out.

    Attributes:
        rows (`list[dict]`): Rows as in [`check_list_rows`].
        duplicates (`int`): Rows that said once more what was there already.
        single (`int`): Prompts left out because they have one completion only.
        tied (`int`): Lists left out because no completion is better than another.
    """

    rows: list[dict[str, Any]]
    duplicates: int = 0
    single: int = 0
    tied: int = 0


def lists_from_scored(rows: Iterable[Mapping[str, Any]], source: str = "the dataset") -> ConvertedLists:
    """Lists from rows `prompt`, `completion`, `score`: those of one prompt together, in the order of the rows.

    A completion that was sampled several times is there once, with the mean of its scores.

    Raises:
        `InputError`: a row lacks something, is empty, or its score is not a finite number.
    """
    groups: dict[str, _Group] = {}
    count = 0
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        check_prompt(row, where)
        check_text(row, "completion", where)
        if not is_number(row.get("score")):
            raise InputError(f"{where}: 'score' is {row.get('score')!r}; it must be a finite number.")
        group = groups.setdefault(text_key(row["prompt"]), _Group(row["prompt"]))
        group.scores.setdefault(group.place(row["completion"]), []).append(float(row["score"]))
        count += 1
    found, single = [], 0
    for group in groups.values():
        means = [sum(score / len(scores) for score in scores) for scores in group.scores.values()]
        single += len(means) < 2
        if len(means) > 1:
            found.append({"prompt": group.prompt, "completions": group.completions, "scores": means})
    kept = [row for row in found if len(set(row["scores"])) > 1]
    distinct = sum(len(group.completions) for group in groups.values())
    return ConvertedLists(kept, duplicates=count - distinct, single=single, tied=len(found) - len(kept))


def lists_from_pairs(rows: Iterable[Mapping[str, Any]], source: str = "the dataset") -> ConvertedLists:
    """Lists with `ranks` from rows `prompt`, `chosen`, `rejected`: pairs of one prompt that hang together by their completions.

    What was chosen ranks before what was rejected, unless other pairs contradict. A completion's rank is one more than the longest
    chain of better ones above it, so that "one against each of the others" becomes one best and a tie of the others, and a
    single pair a list of 2. Where two completions were compared several times the majority counts, and completions
    that beat one another in a circle tie. Pairs of one prompt that share no completion, not even by way of others, become
    lists of their own. Within a list, completions that no chain of pairs compares are compared by their ranks all the same.

    Raises:
        `InputError`: a row lacks something, is empty, or has equal `chosen` and `rejected`.
    """
    groups: dict[str, _Group] = {}
    duplicates = 0
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        check_prompt(row, where)
        for key in ("chosen", "rejected"):
            check_text(row, key, where)
        if row["chosen"] == row["rejected"]:
            raise InputError(f"{where}: 'chosen' and 'rejected' are equal; remove the row.")
        group = groups.setdefault(text_key(row["prompt"]), _Group(row["prompt"]))
        pair = (group.place(row["chosen"]), group.place(row["rejected"]))
        duplicates += pair in group.wins
        group.wins[pair] = group.wins.get(pair, 0) + 1
    found, tied = [], 0
    for group in groups.values():
        for places, ranks in _ranked(len(group.completions), group.wins):
            tied += len(set(ranks)) == 1
            if len(set(ranks)) > 1:
                completions = [group.completions[place] for place in places]
                found.append({"prompt": group.prompt, "completions": completions, "ranks": ranks})
    return ConvertedLists(found, duplicates=duplicates, tied=tied)


class _Group:
    """What is known about one prompt."""

    def __init__(self, prompt: Any):
        self.prompt = prompt
        self.completions: list[Any] = []
        self.scores: dict[int, list[float]] = {}
        self.wins: dict[tuple[int, int], int] = {}
        self._places: dict[str, int] = {}

    def place(self, completion: Any) -> int:
        """Index of a completion, a new one if it was not there."""
        place = self._places.setdefault(text_key(completion), len(self.completions))
        if place == len(self.completions):
            self.completions.append(completion)
        return place


def _ranked(size: int, wins: Mapping[tuple[int, int], int]) -> list[tuple[list[int], list[int]]]:
    """Places and ranks of each set of completions that pairs hold together."""
    beats = torch.zeros(size, size, dtype=torch.bool)
    for (better, worse), count in wins.items():
        beats[better, worse] = count > wins.get((worse, better), 0)
    compared = torch.zeros(size, size, dtype=torch.bool)
    for better, worse in wins:
        compared[better, worse] = compared[worse, better] = True
    above, together = _reached(beats), _reached(compared)
    # In a circle both are above each other, and neither is.
    above = above & ~above.T
    ranks = [0] * size
    for place in above.sum(0).argsort(stable=True).tolist():
        ranks[place] = 1 + max((ranks[other] for other in above[:, place].nonzero().flatten().tolist()), default=0)
    sets: dict[int, list[int]] = {}
    for place in range(size):
        sets.setdefault(min([place, *together[place].nonzero().flatten().tolist()]), []).append(place)
    return [(places, [ranks[place] for place in places]) for places in sets.values()]


def _reached(edges: torch.Tensor) -> torch.Tensor:
    """From which node to which there is a way, `(K, K)` bool."""
    reached = edges.clone()
    for middle in range(len(edges)):
        reached |= reached[:, middle, None] & reached[middle]
    return reached
