"""Which columns rows must have, and what they are called."""

import logging

from datasets import Dataset

from hf_delta.data.files import Source
from hf_delta.errors import InputError
from hf_delta.preference.uses import USES
from hf_delta.recipe.fields import suggest


logger = logging.getLogger(__name__)

# What rows are used for -> the sets of columns that will do; the first set that is there is the one that is checked.
COLUMN_SETS = {
    "sft": [("prompt", "completion"), ("messages",), ("text",), ("input_ids",)],
    **{name: use.columns for name, use in USES.items()},
    "grpo": [("prompt",)],
    "evaluation": [("prompt", "answer")],
}


def rename(source: Source, columns: dict[str, str]) -> Dataset:
    there = source.rows.column_names
    names: dict[str, str] = {}
    for ours, theirs in columns.items():
        if theirs not in there:
            raise InputError(f"dataset_columns: {source.name} has no column {theirs!r}{suggest(theirs, there)}")
        if theirs in names:
            raise InputError(
                f"dataset_columns: {names[theirs]} and {ours} are both {theirs!r}; a column has one name."
            )
        names[theirs] = ours
    # All at once, so that two columns can change places.
    replaced = [ours for ours in columns if ours in there and ours not in names]
    for ours in replaced:
        logger.info("%s: its own column %s gives way to %s.", source.name, ours, columns[ours])
    return source.rows.remove_columns(replaced).rename_columns(names)


def columns_of(source: Source, use: str) -> tuple[str, ...]:
    there = set(source.rows.column_names)
    for columns in COLUMN_SETS[use]:
        if there.issuperset(columns):
            return columns
    wanted = " or ".join(", ".join(columns) for columns in COLUMN_SETS[use])
    who, remedies = "evaluate_pass_at" if use == "evaluation" else f"trainer {use}", {}
    if use in USES:
        who, remedies = USES[use].user, USES[use].remedies
    known = (remedy for columns, remedy in remedies.items() if there.issuperset(columns))
    remedy = next(known, "Map them with dataset_columns: {name here: name in the dataset}.")
    raise InputError(
        f"{source.name} has the columns {', '.join(source.rows.column_names)}; {who} needs {wanted}. {remedy}"
    )
