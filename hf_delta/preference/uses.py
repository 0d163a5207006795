"""What `trainer: dpo` uses rows for: the columns that it needs, and what is checked."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from datasets import Dataset

from hf_delta.preference.list_data import check_list_rows
from hf_delta.preference.lists import LIST_LOSSES
from hf_delta.preference.pair_data import WEIGHT_COLUMNS, check_pair_rows


@dataclass(frozen=True)
class Use:
    """A use of rows.

    Args:
        user (`str`): Who uses them, for messages.
        columns (`list[tuple[str, ...]]`): The sets of columns that will do.
        check (`Callable`): `check(rows, source)` refuses the first bad row.
        remedies (`dict[tuple[str, ...], str]`): Columns that others have -> what to do about it.
    """

    user: str
    columns: list[tuple[str, ...]]
    check: Callable[[Dataset, str], object]
    remedies: dict[tuple[str, ...], str]


_PAIRS = [("prompt", "chosen", "rejected"), ("chosen", "rejected")]
_FROM_LISTS = {("completions",): f"Rows with completions need a loss_type for lists: {', '.join(LIST_LOSSES)}."}
_TO_LISTS = {
    ("chosen", "rejected"): "Make lists of pairs with hf_delta.preference.list_convert.lists_from_pairs, or write a "
    "loss_type for pairs.",
    ("completion", "score"): "Make lists of samples with hf_delta.preference.list_convert.lists_from_scored.",
}
_LISTS = ("trainer dpo with a list loss", [("prompt", "completions")])

USES = {
    "dpo": Use("trainer dpo", _PAIRS, check_pair_rows, _FROM_LISTS),
    "dpo_weights": Use(
        "trainer dpo with token weights from columns",
        [(*columns, *WEIGHT_COLUMNS) for columns in _PAIRS],
        partial(check_pair_rows, weights=True),
        _FROM_LISTS,
    ),
    "dpo_lists": Use(*_LISTS, check_list_rows, _TO_LISTS),
    "dpo_labelled_lists": Use(*_LISTS, partial(check_list_rows, rescale=False), _TO_LISTS),
}


def preference_use(loss_type: Iterable[str], *, weights: bool = False, rescale: bool = True) -> str:
    """Which of [`USES`] a configuration of DPO makes of its rows.

    Args:
        loss_type (`Iterable[str]`): Its losses.
        weights (`bool`, *optional*, defaults to `False`): Whether rows must have `chosen_weights` and `rejected_weights`.
        rescale (`bool`, *optional*, defaults to `True`): Whether a list's scores may be on any scale, see
            [`~hf_delta.preference.list_data.add_labels`].
    """
    if any(name in LIST_LOSSES for name in loss_type):
        return "dpo_lists" if rescale else "dpo_labelled_lists"
    return "dpo_weights" if weights else "dpo"
