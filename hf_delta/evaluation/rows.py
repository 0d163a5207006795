"""Evaluation problems: read, checked before any model is loaded, and told apart from other problems."""

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from hf_delta.errors import InputError


NO_LEVEL = "all"


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read problems from a JSON lines file, see [`checked_rows`] for what a row holds.

    Raises:
        InputError: if the file is missing, holds no row, or a line is not a JSON object or not a problem.
    """
    return checked_rows(json_rows(path, "Evaluation data"), str(path))


def json_rows(path: str | Path, what: str) -> list[Any]:
    """What stands on each line of a JSON lines file that is not blank.

    Args:
        path (`str` or `Path`): the file.
        what (`str`): what to call it in messages.

    Raises:
        InputError: if the file cannot be read, or a line is not JSON (NaN and infinities are not).
    """
    path = Path(path)
    try:
        # Not splitlines: JSON strings may hold U+2028 and other ends of lines.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{what} {path} cannot be read ({error}). Give a JSON lines file.") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line, parse_constant=_refuse_constant))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, row {number}: not JSON ({error}). Each line is one JSON object.") from error
    return rows


def checked_rows(rows: Iterable[dict[str, Any]], source: str = "the evaluation data") -> list[dict[str, Any]]:
    """Copies of the rows with `level` and `prompt_id` always there, as strings.

    A row has `prompt` (a string, or a list of messages for the chat template) and `answer`; `level` (in all rows or in
    none) and `prompt_id` (unique) are optional. All other columns are left for the reward function.

    Args:
        rows (iterable of `dict`): a `datasets.Dataset` will do.
        source (`str`, *optional*): what to call them in messages.

    Raises:
        InputError: if there is no row, or a row lacks something, or an identifier occurs twice.
    """
    rows = [checked_row(row, number, source) for number, row in enumerate(rows, start=1)]
    if not rows:
        raise InputError(f"{source} holds no rows: there is nothing to evaluate.")
    levelled = [row.get("level") is not None for row in rows]
    if any(levelled) and not all(levelled):
        raise InputError(f"{source}, row {levelled.index(False) + 1}: no `level`, but other rows have one.")
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        row["level"] = str(row["level"]) if all(levelled) else NO_LEVEL
        identifier = row.get("prompt_id")
        row["prompt_id"] = str(number if identifier is None else identifier)
        if row["prompt_id"] in seen:
            raise InputError(
                f"{source}, row {number}: prompt_id {row['prompt_id']!r} is that of row {seen[row['prompt_id']]} too; "
                "make them unique or leave the column out."
            )
        seen[row["prompt_id"]] = number
    return rows


def fingerprint(rows: list[dict[str, Any]]) -> str:
    """16 hexadecimal digits that are equal for equal rows in the same order, wherever they lie."""
    try:
        text = json.dumps(rows, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise InputError(f"Evaluation rows hold something that JSON cannot ({error}).") from error
    return sha256(text.encode()).hexdigest()[:16]


def natural_key(level: str) -> list[tuple[bool, int, str]]:
    """Sort key under which `add2` comes before `add10`."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", level) if part
    ]


def checked_row(row: Any, number: int, source: str, keys: Iterable[str] = ("prompt", "answer")) -> dict[str, Any]:
    """A copy of a row that is a JSON object in which `keys` are filled and `prompt` is text or a list of messages.

    Raises:
        InputError: with source and number, if it is not so.
    """
    if not isinstance(row, dict):
        raise InputError(f"{source}, row {number}: a {type(row).__name__} where a JSON object should be.")
    for key in keys:
        value = row.get(key)
        if (
            value is None
            or (isinstance(value, str | list) and not value)
            or (isinstance(value, str) and not value.strip())
        ):
            raise InputError(f"{source}, row {number}: `{key}` is {'empty' if key in row else 'missing'}.")
    prompt = row["prompt"]
    messages = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m and "content" in m for m in prompt)
    if not isinstance(prompt, str) and not messages:
        raise InputError(
            f"{source}, row {number}: `prompt` must be a string or a list of messages with role and content."
        )
    try:
        json.dumps(prompt, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{source}, row {number}: half of a surrogate pair, which is no text ({error}).") from error
    return dict(row)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
