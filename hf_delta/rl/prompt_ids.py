"""Stable names for prompts, and what a dataset must have for rules that learn something about each."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hf_delta.errors import InputError


# What makes a prompt, out of TRL's columns.
_PROMPT_COLUMNS = ("prompt", "image", "images")


def with_prompt_ids(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Add the column `prompt_id` where a dataset has none: the row's index, or in a stream a hash of its prompt.

    A row of a stream has no stable place: shards are shuffled and each counts from 0.

    Raises:
        `InputError`: an id is missing, or names two different prompts.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row: {"prompt_id": _prompt_hash(row), **row})
    if "prompt_id" in dataset.column_names:
        _check_ids(dataset)
        return dataset
    return dataset.add_column("prompt_id", [str(i) for i in range(len(dataset))])


def column_values(dataset: Dataset | IterableDataset, column: str, key: str) -> tuple[str, ...]:
    """The different values of a column, sorted; none of a stream, whose values nobody knows beforehand.

    Args:
        key (`str`): Recipe key that names the column, for the message.

    Raises:
        `InputError`: there is no such column, or a row has no value in it.
    """
    names = dataset.column_names
    if names is not None and column not in names:
        raise InputError(f"{key}: the dataset has no column {column!r}; it has {', '.join(sorted(names))}.")
    if isinstance(dataset, IterableDataset):
        return ()
    return tuple(sorted(set(map(str, _without_gaps(dataset, column, key)))))


def _without_gaps(dataset: Dataset, column: str, key: str) -> Sequence[Any]:
    values = dataset[column][:]
    # NaN is what an empty cell of numbers becomes, and differs from itself.
    missing = [row for row, value in enumerate(values) if value is None or value == "" or value != value]
    if missing:
        others = f", nor have {len(missing) - 1} more of {len(values)} rows" if len(missing) > 1 else ""
        raise InputError(f"{key}: row {missing[0]} has no {column}{others}. Fill the column, or leave these rows out.")
    return values


def _check_ids(dataset: Dataset) -> None:
    ids = _without_gaps(dataset, "prompt_id", "prompt_id")
    if len(set(ids)) == len(ids) or "prompt" not in dataset.column_names:
        return
    # A prompt may be there several times and is learnt about once; two prompts of one name would be mixed up.
    first: dict[Any, tuple[int, str]] = {}
    prompts = dataset.select_columns([name for name in _PROMPT_COLUMNS if name in dataset.column_names])
    for row, (prompt_id, prompt) in enumerate(zip(ids, prompts)):
        digest = _prompt_hash(prompt)
        other, known = first.setdefault(prompt_id, (row, digest))
        if known != digest:
            raise InputError(
                f"prompt_id {prompt_id!r} names two different prompts, in rows {other} and {row}. Give each its own, or "
                "leave the column out: then ids are made from the places of the rows."
            )


def _prompt_hash(row: dict[str, Any]) -> str:
    """Of the prompt and the images beside it."""
    parts = [row[name] for name in _PROMPT_COLUMNS if name in row]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=_as_text).encode()).hexdigest()[:16]


def _as_text(value: Any) -> str:
    # The text of an image is the address of the object.
    if hasattr(value, "tobytes"):
        return f"{getattr(value, 'size', '')} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)
