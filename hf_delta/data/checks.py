"""What the values of a column must be, with the place of the first that is not."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from hf_delta.data.files import Source, malformed
from hf_delta.errors import InputError
from hf_delta.recipe.fields import suggest


REPLY_COLUMNS = ("completion", "chosen", "rejected")
_TEXT_COLUMNS = ("prompt", *REPLY_COLUMNS)
# What SFT takes from rows that are tokens already, one number for each of them.
_BESIDE_TOKENS = ("labels", "completion_mask", "assistant_masks")


def check_rows(source: Source, columns: Iterable[str]) -> None:
    """Refuse a dataset without rows and the first row where one of the columns is missing, empty or no prompt or reply.

    Raises:
        `InputError`: with the source and the number of the row, counted from 1.
    """
    if len(source.rows) == 0:
        raise InputError(f"{source.name} has no rows.")
    for column in dict.fromkeys(columns):
        if column not in source.rows.column_names:
            raise InputError(f"{source.name} has no column {column!r}{suggest(column, source.rows.column_names)}")
        values = source.rows.select_columns(column).with_format("arrow")[:][column]
        if not _is_plain_text(values) or column in ("messages", "input_ids"):
            _check_each(source, column)
        elif (index := pc.index(pc.equal(pc.coalesce(values, ""), ""), True).as_py()) >= 0:
            raise _no_value(source, index + 1, column)


def _is_plain_text(values: pa.ChunkedArray) -> bool:
    """Whether a column can be checked as a whole, without a Python object for each of what may be millions of rows."""
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return False
    try:
        values.validate(full=True)
    except pa.ArrowInvalid:  # not UTF-8
        return False
    return True


def _check_each(source: Source, column: str) -> None:
    first = None
    for number, value in enumerate(_values(source, column), start=1):
        if _is_empty(value):
            raise _no_value(source, number, column)
        if column in _KINDS and not _KINDS[column][0](value):
            wanted = _KINDS[column][1]
            raise InputError(f"{source.name}: row {number}: {column!r} is {value!r:.80}, which is {wanted}.")
        if column in _TEXT_COLUMNS and type(value) is not type(first or value):
            here, there = ("text", "messages") if isinstance(value, str) else ("messages", "text")
            raise InputError(
                f"{source.name}: row {number}: {column!r} is {here}, and in row 1 it is {there}: write all alike."
            )
        first = value if first is None else first


def _no_value(source: Source, number: int, column: str) -> InputError:
    return InputError(f"{source.name}: row {number} has no {column!r}. Fill it in, or remove the row.")


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) and _is_message(message) for message in value)


def _is_message(message: dict[str, Any]) -> bool:
    # What calls tools need not say anything, and what is seen beside images is a list of parts.
    content, calls = message.get("content"), message.get("tool_calls")
    said = isinstance(content, (str, list)) or (content is None and bool(calls))
    return isinstance(message.get("role"), str) and bool(message["role"]) and said


def check_one_kind(source: Source) -> None:
    """Prompts and completions are both text, or both messages; within a column all are alike."""
    first = source.rows[0]
    if isinstance(first["prompt"], str) != isinstance(first["completion"], str):
        raise InputError(
            f"{source.name}: row 1: one of 'prompt' and 'completion' is text and the other messages; make both the same."
        )


def check_token_columns(source: Source) -> None:
    """Labels and masks of rows for SFT have a number for each token; rows of text have none.

    Raises:
        `InputError`: with the source and the number of the row, counted from 1.
    """
    there = [column for column in _BESIDE_TOKENS if column in source.rows.column_names]
    if there and "input_ids" not in source.rows.column_names:
        raise InputError(
            f"{source.name} has the column {there[0]!r}, which SFT takes for tokens, beside 'input_ids'. Rename it with "
            f"dataset_columns: {{another_name: {there[0]}}}, or remove it."
        )
    for column in there:
        for number, (tokens, values) in enumerate(zip(source.rows["input_ids"], source.rows[column]), start=1):
            if not isinstance(values, list) or len(values) != len(tokens) or any(type(v) is not int for v in values):
                raise InputError(
                    f"{source.name}: row {number}: {column!r} is {values!r:.80}, and must be a list of {len(tokens)} whole numbers, "
                    "one for each of 'input_ids'."
                )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)


_MESSAGES = "a list of messages {role: …, content: …}"
_TEXT_OR_MESSAGES = (
    lambda value: isinstance(value, str) or _is_conversation(value),
    f"neither text nor {_MESSAGES}",
)
# What the values of a column must be, and what is said of others.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(_TEXT_COLUMNS, _TEXT_OR_MESSAGES),
    "text": (lambda value: isinstance(value, str), "no text"),
    "messages": (_is_conversation, f"not {_MESSAGES}"),
    "input_ids": (_is_token_ids, "no list of the numbers of tokens"),
}


def _values(source: Source, column: str) -> Iterator[Any]:
    try:
        yield from source.rows[column]
    except UnicodeDecodeError as error:
        # Arrow reads files without looking at the encoding, and notices when text is asked for.
        where, _ = malformed(Path(source.name)) if Path(source.name).is_file() else ("", "")
        raise InputError(f"{source.name}{where}: not UTF-8 text ({error.reason}).") from error


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list)) and len(value) == 0)
