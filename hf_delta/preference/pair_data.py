"""Rows with pairs of completions: what is refused, the weights of their tokens, and a key for each sample."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value

from hf_delta.errors import InputError
from hf_delta.ids import digests
from hf_delta.preference.list_data import Rows, check_prompt, check_text, is_number


# Column of weights -> column of the tokens that it weighs.
WEIGHT_COLUMNS = {"chosen_weights": "chosen_ids", "rejected_weights": "rejected_ids"}
SAMPLE_KEY = "sample_key"

# What makes a sample, out of the columns of pairs and of lists.
_CONTENT = ("prompt", "chosen", "rejected", "completions")
_BATCH = 1000


def check_pair_rows(rows: Rows, source: str = "the dataset", *, weights: bool = False) -> Rows:
    """Refuse the first row that is no pair.

    A row has `prompt`, `chosen` and `rejected`, all texts or all lists of messages; or `chosen` and `rejected` only, with
    what they both begin with as the prompt. With `weights` it also has `chosen_weights` and `rejected_weights`: a number, or
    a list with one for each token.

    Args:
        rows (`Dataset`, `IterableDataset`, or iterable of `dict`): Rows.
        source (`str`, *optional*): What to call them in messages.
        weights (`bool`, *optional*, defaults to `False`): Whether they must have weights.

    Returns:
        The rows; of an `IterableDataset` another one, which checks the rows as they come by.

    Raises:
        `InputError`: with the number of the row, counted from 1, and the key: no prompt; an empty completion; `chosen` equal
            to `rejected`; text and messages in one row; or a weight that is missing, negative, or no finite number.
    """
    if isinstance(rows, IterableDataset):
        options = {"source": source, "weights": weights}
        return rows.map(_checked, with_indices=True, fn_kwargs=options, features=rows.features)
    found = _suspects(rows, weights) if isinstance(rows, Dataset) else enumerate(rows)
    index = -1
    for index, row in found:
        _checked(row, index, source, weights)
    if index < 0 and not (isinstance(rows, Dataset) and len(rows)):
        raise InputError(f"{source} has no rows.")
    return rows


def check_weight_lengths(dataset: Dataset | IterableDataset, source: str = "the dataset") -> Dataset | IterableDataset:
    """Refuse the first tokenised row with a list of weights that has not one for each token.

    Rows are counted as they are in `dataset`, where TRL has left out those whose prompt alone fills `max_length`; the
    message quotes the prompt.

    Args:
        dataset (`Dataset` or `IterableDataset`): With `chosen_ids` and `rejected_ids`, and rows that [`check_pair_rows`] with
            `weights` let pass.
        source (`str`, *optional*): What to call it in messages.

    Returns:
        The dataset; of an `IterableDataset` another one, which checks the rows as they come by.

    Raises:
        `InputError`: with the number of the row, counted from 1, the key, and both lengths.
    """
    if isinstance(dataset, IterableDataset):
        options = {"source": source}
        return dataset.map(_lengths_checked, with_indices=True, fn_kwargs=options, features=dataset.features)
    if len(dataset) == 0:
        return dataset
    for key, tokens in WEIGHT_COLUMNS.items():
        table = dataset.select_columns([key, tokens]).with_format("arrow")[:]
        if _is_list(table[key].type):
            other = pc.not_equal(pc.list_value_length(table[key]), pc.list_value_length(table[tokens]))
        elif pa.types.is_integer(table[key].type) or pa.types.is_floating(table[key].type):
            continue
        else:
            other = pa.chunked_array([[True] * len(dataset)])
        for index in np.flatnonzero(other.to_numpy()):
            _lengths_checked(dataset.with_format(None)[int(index)], int(index), source)
    return dataset


def with_sample_keys(dataset: Dataset | IterableDataset, column: str | None = None) -> Dataset | IterableDataset:
    """Add the column `sample_key` (int64): of a row's id, or of what the row says.

    A key does not depend on the place of the row, nor on the process or the run. Without `column` it is a digest of the row's
    `prompt`, `chosen`, `rejected` or `completions`, as they are now: rows that say the same have one key and count as one
    sample. With `column` rows may say the same under two ids, and a row may be there several times under its id.

    Args:
        dataset (`Dataset` or `IterableDataset`): Pairs or lists. Keys that it has already stay.
        column (`str`, *optional*): Column with the ids, strings or whole numbers.

    Raises:
        `InputError`: there is no such column, a row has no id, or one id names two different rows (found out of a `Dataset`
            only); `sample_key` is there and has no whole numbers.
    """
    names = dataset.column_names or list(next(iter(dataset), {}))
    if column is not None and column not in names:
        raise InputError(f"sample_id_column: the dataset has no column {column!r}; it has {', '.join(sorted(names))}.")
    if SAMPLE_KEY in names:
        return _with_own_keys(dataset)
    if isinstance(dataset, IterableDataset):
        features = dataset.features and type(dataset.features)({**dataset.features, SAMPLE_KEY: Value("int64")})
        return dataset.map(_with_key, with_indices=True, fn_kwargs={"column": column}, features=features)
    if column is None:
        return dataset.add_column(SAMPLE_KEY, _content_keys(dataset))
    ids = dataset.with_format(None)[column][:]
    for index, value in enumerate(ids):
        _check_id(value, index, column)
    keys = digests(ids, column)
    _check_repeated(dataset, column, ids, keys)
    return dataset.add_column(SAMPLE_KEY, keys)


def _suspects(dataset: Dataset, weights: bool) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Place and row of all that may be bad: those that columns of texts and numbers, looked at as a whole, point to."""
    texts = [key for key in ("prompt", "chosen", "rejected") if key in dataset.column_names]
    numbers = [key for key in WEIGHT_COLUMNS if weights and key in dataset.column_names]
    dataset = dataset.select_columns([*texts, *numbers]).with_format(None)
    if len(dataset) == 0:
        return
    kinds = [getattr(dataset.features[key], "dtype", None) for key in texts]
    complete = {"chosen", "rejected"} <= set(texts) and len(numbers) == len(WEIGHT_COLUMNS) * weights
    if not complete or not set(kinds) <= {"string", "large_string"}:
        yield from enumerate(dataset)
        return
    table = dataset.with_format("arrow")[:]
    bad = _bad_texts({key: pc.coalesce(table[key].cast(pa.large_string()), "") for key in texts})
    for key in numbers:
        bad |= _bad_weights(table[key])
    for index in map(int, np.flatnonzero(bad)):
        yield index, dataset[index]


def _bad_texts(texts: dict[str, pa.ChunkedArray]) -> np.ndarray:
    bad = pc.equal(texts["chosen"], texts["rejected"])
    for column in texts.values():
        bad = pc.or_(bad, pc.equal(column, ""))
    if "prompt" not in texts:
        # Those with less than two characters in common may have no prompt.
        starts = [pc.utf8_slice_codeunits(texts[key], 0, 2) for key in ("chosen", "rejected")]
        bad = pc.or_(bad, pc.or_(pc.not_equal(*starts), pc.less(pc.utf8_length(starts[0]), 2)))
    return bad.to_numpy()


def _bad_weights(column: pa.ChunkedArray) -> np.ndarray:
    if not _is_list(column.type):
        return _bad_numbers(column)
    parts = []
    for chunk in column.chunks:
        bad = pc.fill_null(pc.equal(pc.list_value_length(chunk), 0), True).to_numpy(zero_copy_only=False).copy()
        values = pc.list_flatten(chunk)
        bad[pc.list_parent_indices(chunk).to_numpy()[_bad_numbers(pa.chunked_array([values]))]] = True
        parts.append(bad)
    return np.concatenate(parts)


def _bad_numbers(column: pa.ChunkedArray) -> np.ndarray:
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return np.ones(len(column), dtype=bool)
    values = column.cast(pa.float64(), safe=False)
    return pc.fill_null(pc.invert(pc.and_(pc.is_finite(values), pc.greater_equal(values, 0))), True).to_numpy()


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _checked(row: Mapping[str, Any], index: int, source: str, weights: bool) -> Mapping[str, Any]:
    where = f"{source}, row {index + 1}"
    if "prompt" in row:
        check_prompt(row, where)
        pair = row
    else:
        # Each has to be of the kind of the other, as both have to be of the kind of the prompt.
        pair = {**row, "prompt": row.get("chosen")}
    for key in ("chosen", "rejected"):
        check_text(pair, key, where)
    if row["chosen"] == row["rejected"]:
        raise InputError(
            f"{where}: 'chosen' and 'rejected' are equal; remove the row. A recipe leaves such rows out with "
            "drop_equal_pairs: true."
        )
    if "prompt" not in row and not _common_start(row["chosen"], row["rejected"]):
        raise InputError(
            f"{where}: 'chosen' and 'rejected' begin with nothing in common that could be the prompt, and there is no "
            "'prompt'. Add one."
        )
    for key in WEIGHT_COLUMNS if weights else ():
        _check_weights(row.get(key), key, where)
    return row


def _common_start(chosen: Any, rejected: Any) -> int:
    """Characters or messages that TRL's `extract_prompt` takes for the prompt: without a space at the end, and never all."""
    shorter = min(len(chosen), len(rejected))
    same = next((place for place in range(shorter) if chosen[place] != rejected[place]), None)
    if same is None:
        return shorter - 1
    return same - 1 if same and chosen[same - 1] == " " else same


def _check_weights(value: Any, key: str, where: str) -> None:
    if value is None:
        raise InputError(f"{where} has no {key!r}: it must be a number, or a list with one for each token.")
    if isinstance(value, list) and not value:
        raise InputError(f"{where}: {key!r} is an empty list; give one number for each token, or one for all.")
    for place, weight in enumerate(value) if isinstance(value, list) else [(None, value)]:
        if not is_number(weight) or weight < 0:
            name = key if place is None else f"{key}[{place}]"
            raise InputError(f"{where}: '{name}' is {weight!r:.80}; a weight must be a finite number, 0 or more.")


def _lengths_checked(row: Mapping[str, Any], index: int, source: str) -> Mapping[str, Any]:
    for key, tokens in WEIGHT_COLUMNS.items():
        if isinstance(row[key], list) and len(row[key]) != len(row[tokens]):
            prompt = f" (prompt {row['prompt']!r:.80})" if "prompt" in row else ""
            raise InputError(
                f"{source}, row {index + 1}{prompt}: {key!r} has {len(row[key])} numbers, and {key.split('_')[0]!r} "
                f"{len(row[tokens])} tokens, the end token among them. Give one number for each, or one for all."
            )
    return row


def _with_own_keys(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    kind = dataset.features and getattr(dataset.features[SAMPLE_KEY], "dtype", None)
    if dataset.features and kind != "int64":
        raise InputError(
            f"The dataset has a column {SAMPLE_KEY!r} of its own ({kind}), which must be int64; rename it."
        )
    if isinstance(dataset, Dataset) and None in (keys := dataset.with_format(None)[SAMPLE_KEY][:]):
        raise InputError(
            f"Row {keys.index(None) + 1} of the dataset has no {SAMPLE_KEY!r}. Fill it, or rename the column."
        )
    return dataset


def _with_key(row: Mapping[str, Any], index: int, column: str | None) -> dict[str, Any]:
    if column is not None:
        _check_id(row.get(column), index, column)
    name = _content(row) if column is None else row[column]
    return {**row, SAMPLE_KEY: int(digests([name], column or "the rows")[0])}


def _check_id(value: Any, index: int, column: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise InputError(
            f"sample_id_column: row {index + 1} has {value!r:.80} as {column!r}; an id must be a string or a whole number. "
            "Fill the column, or leave the row out."
        )


def _check_repeated(dataset: Dataset, column: str, ids: list[str | int], keys: np.ndarray) -> None:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(keys)))
    if not len(repeated):
        return
    rows, others = _content_keys(dataset.select(repeated)), _content_keys(dataset.select(first[inverse[repeated]]))
    for place in np.flatnonzero(rows != others)[:1]:
        index = repeated[place]
        raise InputError(
            f"sample_id_column: {column} {ids[index]!r} names two different rows, {first[inverse[index]] + 1} and "
            f"{index + 1}. Give each its own, or leave sample_id_column out: then what a row says is its id."
        )


def _content_keys(dataset: Dataset) -> np.ndarray:
    columns = [name for name in _CONTENT if name in dataset.column_names]
    parts = [np.empty(0, dtype=np.int64)]
    for batch in dataset.select_columns(columns).with_format(None).iter(_BATCH):
        rows = (dict(zip(columns, values)) for values in zip(*batch.values()))
        parts.append(digests([_content(row) for row in rows], "the rows"))
    return np.concatenate(parts)


def _content(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _said(row[name]) for name in _CONTENT if row.get(name) is not None}, sort_keys=True)


def _said(value: Any) -> Any:
    """Without the fields that are null: whether messages have them depends on the other rows of the file."""
    if isinstance(value, dict):
        return {name: _said(part) for name, part in value.items() if part is not None}
    return [_said(part) for part in value] if isinstance(value, list) else value
