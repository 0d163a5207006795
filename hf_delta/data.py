"""Rows for training and evaluation: loading, renaming and checking, with the place of every bad row."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from hf_delta.errors import InputError
from hf_delta.paths import expanded
from hf_delta.preference.uses import USES
from hf_delta.recipe.arguments import DataArguments
from hf_delta.recipe.fields import suggest
from hf_delta.recipe.rewards import columns_needed


logger = logging.getLogger(__name__)

# A leading underscore keeps the directory out of uploads to the Hub.
CACHE = "_datasets"

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_REPLY_COLUMNS = ("completion", "chosen", "rejected")
_TEXT_COLUMNS = ("prompt", *_REPLY_COLUMNS)

# What rows are used for -> the sets of columns that will do; the first set that is there is the one that is checked.
COLUMN_SETS = {
    "sft": [("prompt", "completion"), ("messages",), ("text",), ("input_ids",)],
    **{name: use.columns for name, use in USES.items()},
    "grpo": [("prompt",)],
    "evaluation": [("prompt", "answer")],
}


@dataclass(frozen=True)
class Source:
    """Rows and where they came from: a file, or a dataset of the Hub."""

    name: str
    rows: Dataset


def load_train_rows(args: DataArguments, use: str, cache_dir: Path, rewards: Sequence[Callable] = ()) -> Dataset:
    """The checked rows to train on.

    Args:
        args ([`DataArguments`]): Data keys of the recipe.
        use (`str`): `sft` or `grpo`, or for DPO what [`~hf_delta.preference.uses.preference_use`] says.
        cache_dir (`Path`): Where the converted local files go.
        rewards (`Sequence[Callable]`): Reward functions, whose columns must not be empty either.

    Raises:
        `InputError`: no such file or dataset, no rows, a malformed line, a missing column, or a value that is empty
        or no prompt or reply, with file and row.
    """
    if args.train_file is not None:
        sources = _load_files(args.train_file, "train_file", cache_dir)
    else:
        sources = [_load_from_hub(args, args.dataset_split)]
    return _prepare(sources, args, [use], rewards, args.max_train_rows)


def load_eval_rows(
    args: DataArguments, uses: Sequence[str], cache_dir: Path, rewards: Sequence[Callable] = ()
) -> Dataset | None:
    """As [`load_train_rows`] for `eval_file` or `eval_split`, checked for all of `uses`; `None` if there are none."""
    if not uses:
        return None
    if args.eval_file is not None:
        sources = _load_files(args.eval_file, "eval_file", cache_dir)
    else:
        sources = [_load_from_hub(args, args.eval_split)]
    return _prepare(sources, args, uses, rewards, None)


def _prepare(
    sources: list[Source], args: DataArguments, uses: Sequence[str], rewards: Sequence[Callable], max_rows: int | None
) -> Dataset:
    parts, count, checked = [], 0, []
    for source in sources:
        rows = _rename(source, args.dataset_columns or {})
        if rewards and "prompt_id" not in rows.column_names:
            rows = rows.add_column("prompt_id", [str(count + index) for index in range(len(rows))])
        count += len(rows)
        if args.drop_equal_pairs:
            rows = _without_equal_pairs(rows, source.name)
        source = Source(source.name, rows)
        columns = [column for use in uses for column in _columns_of(source, use)]
        if columns != (checked := checked or columns):
            raise InputError(
                f"{source.name} has {', '.join(columns)}, and {sources[0].name} {', '.join(checked)}: write both alike."
            )
        check_rows(source, [*columns, *(c for reward in rewards for c in columns_needed(reward, rows.column_names))])
        if "sft" in uses and columns[:2] == ["prompt", "completion"]:
            _check_one_kind(source)
        for use in USES.keys() & uses:
            USES[use].check(rows, source.name)
        parts.append(rows)
    rows = _joined(parts, sources)
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    if args.prompt_style == "conversational":
        rows = rows.map(lambda row: as_conversation(row, args.system_prompt), desc="Prompts to messages")
    return rows


def _joined(parts: list[Dataset], sources: list[Source]) -> Dataset:
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets(parts)
    except (ValueError, TypeError) as error:
        first = parts[0].features
        for source, part in zip(sources[1:], parts[1:]):
            for column, kind in part.features.items():
                if column in first and first[column] != kind:
                    raise InputError(
                        f"{source.name}: {column} is {kind}, and in {sources[0].name} it is {first[column]}: write both alike."
                    ) from error
        raise InputError(f"{' and '.join(source.name for source in sources)} do not go together: {error}") from error


def _without_equal_pairs(rows: Dataset, name: str) -> Dataset:
    if not {"chosen", "rejected"} <= set(rows.column_names):
        raise InputError(f"drop_equal_pairs: {name} has no columns chosen and rejected. Remove the key.")
    kept = rows.filter(lambda chosen, rejected: chosen != rejected, input_columns=["chosen", "rejected"])
    logger.info(
        "%s: %d of %d rows left out, whose chosen and rejected are equal.", name, len(rows) - len(kept), len(rows)
    )
    return kept


def _load_files(files: str | list[str], key: str, cache_dir: Path) -> list[Source]:
    sources = []
    if not files:
        raise InputError(f"{key} names no file.")
    for name in [files] if isinstance(files, str) else files:
        path = expanded(name)
        if path.is_dir():
            raise InputError(f"{key}: {path} is a directory; name the files in it.")
        if not path.is_file():
            raise InputError(f"{key}: {path} does not exist.")
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise InputError(f"{key}: {path} is none of {', '.join(_BUILDERS)}.")
        sources.append(Source(str(path), _load_file(path, builder, cache_dir)))
    return sources


def _load_file(path: Path, builder: str, cache_dir: Path) -> Dataset:
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not beginning.strip():
        raise InputError(f"{path} has no rows.")
    try:
        return load_dataset(builder, data_files=str(path), split="train", cache_dir=str(cache_dir))
    except (DatasetGenerationError, ValueError, TypeError, LookupError, OSError) as error:
        if "corresponds to no data" in str(error):
            # So says datasets of a file with a header or brackets and nothing else.
            raise InputError(f"{path} has no rows.") from error
        where, reason = _malformed(path) if builder == "json" else ("", str(error.__cause__ or error))
        raise InputError(f"{path}{where}: {reason or error.__cause__ or error}") from error


def _malformed(path: Path) -> tuple[str, str]:
    """Line and reason of the first thing in a JSON file that is not what it should be; empty where all is well."""
    # A `.json` file is one text, and `.jsonl` one on each line.
    texts = [path.read_bytes()] if path.suffix == ".json" else path.read_bytes().splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            row = json.loads(text) if text.strip() else {}
        except UnicodeDecodeError as error:
            return f":{number}", f"not UTF-8 text ({error.reason})."
        except json.JSONDecodeError as error:
            return f":{number + error.lineno - 1}", f"not valid JSON ({error.msg})."
        if path.suffix == ".jsonl" and not isinstance(row, dict):
            return f":{number}", "a line must be a JSON object, {…}."
    return "", ""


def _load_from_hub(args: DataArguments, split: str) -> Source:
    name = f"{args.dataset_name} ({split})"
    try:
        return Source(name, load_dataset(args.dataset_name, args.dataset_config, split=split))
    except (ValueError, OSError) as error:
        raise InputError(f"dataset_name: {name} cannot be loaded: {error}") from error


def _rename(source: Source, columns: dict[str, str]) -> Dataset:
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


def _columns_of(source: Source, use: str) -> tuple[str, ...]:
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
    return bool(message.get("role")) and said


def _check_one_kind(source: Source) -> None:
    """Prompts and completions are both text, or both messages; within a column all are alike."""
    first = source.rows[0]
    if isinstance(first["prompt"], str) != isinstance(first["completion"], str):
        raise InputError(
            f"{source.name}: row 1: one of 'prompt' and 'completion' is text and the other messages; make both the same."
        )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(token, int) and token >= 0 for token in value)


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
        where, _ = _malformed(Path(source.name)) if Path(source.name).is_file() else ("", "")
        raise InputError(f"{source.name}{where}: not UTF-8 text ({error.reason}).") from error


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list)) and len(value) == 0)


def as_conversation(row: dict[str, Any], system_prompt: str | None = None) -> dict[str, Any]:
    """Text columns of a row as messages; columns that are messages already stay."""
    changed: dict[str, Any] = {}
    if isinstance(row.get("prompt"), str):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        changed["prompt"] = [*system, {"role": "user", "content": row["prompt"]}]
    for column in _REPLY_COLUMNS:
        if isinstance(row.get(column), str):
            changed[column] = _reply(row[column])
    if isinstance(row.get("completions"), list):
        changed["completions"] = [_reply(reply) if isinstance(reply, str) else reply for reply in row["completions"]]
    return changed


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
