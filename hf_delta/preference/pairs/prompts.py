"""The prompts that two models answer: read, checked, and named."""

import json
from pathlib import Path
from typing import Any

from hf_delta.errors import InputError
from hf_delta.evaluation.rows import checked_row, json_rows


# What other files of prompts hold besides: replies, which the pairs replace.
REPLIES = ("chosen", "rejected", "completion", "messages")


def load_prompts(path: str | Path) -> tuple[list[dict[str, Any]], int]:
    """Rows with `prompt` and `prompt_id`, and how many were left out because they repeat an earlier row.

    A row has `prompt`, a string or a list of messages for the chat template. `prompt_id` is the number of the row where it is
    missing; a row with the `prompt_id` and the prompt of an earlier one is left out. Columns with replies are left out, all
    others stay.

    Raises:
        InputError: if the file cannot be read or holds no row, or a row has no prompt, text that is not Unicode, the
            `prompt_id` of another prompt, or a conversation where the first has text.
    """
    rows: dict[str, dict[str, Any]] = {}
    numbers: dict[str, int] = {}
    repeated = 0
    for number, content in enumerate(json_rows(path, "The file of prompts"), start=1):
        row = _checked(content, number, str(path))
        first = next(iter(rows.values()), row)
        if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
            kinds = ("text", "a list of messages")
            here, there = kinds if isinstance(row["prompt"], str) else kinds[::-1]
            raise InputError(f"{path}, row {number}: `prompt` is {here}, and in row 1 it is {there}: write all alike.")
        name = row["prompt_id"]
        if name not in rows:
            rows[name], numbers[name] = row, number
        elif rows[name]["prompt"] == row["prompt"]:
            repeated += 1
        else:
            raise InputError(
                f"{path}, row {number}: prompt_id {name!r} is that of row {numbers[name]} too, which has another prompt; make "
                "them unique or leave the column out."
            )
    if not rows:
        raise InputError(f"{path} holds no rows: there is nothing to answer.")
    return list(rows.values()), repeated


def check_columns(rows: list[dict[str, Any]], columns: list[str], path: str | Path, who: str) -> None:
    """Refuse the first row that lacks something in one of the columns that `who` needs.

    Raises:
        InputError: with file, row and column.
    """
    for row in rows:
        for column in columns:
            if row.get(column) in (None, ""):
                raise InputError(f"{path}, prompt_id {row['prompt_id']!r}: no `{column}`, which {who} needs.")


def _checked(content: Any, number: int, source: str) -> dict[str, Any]:
    row = checked_row(content, number, source, keys=("prompt",))
    name = row.get("prompt_id")
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise InputError(f"{source}, row {number}: `prompt_id` is {name!r}; it must be a string or a whole number.")
    row["prompt_id"] = str(number if name is None else name)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source}, row {number}: half of a surrogate pair, which is no text ({error}).") from error
    return {key: value for key, value in row.items() if key not in REPLIES}
