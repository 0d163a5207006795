"""Rows for training and evaluation: loading, renaming and checking, with the place of every bad row."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from hf_delta.data.checks import REPLY_COLUMNS, check_one_kind, check_rows, check_token_columns
from hf_delta.data.columns import columns_of, rename
from hf_delta.data.files import Source, load_files, load_from_hub
from hf_delta.errors import InputError
from hf_delta.preference.uses import USES
from hf_delta.recipe.arguments import DataArguments
from hf_delta.recipe.rewards import columns_needed


logger = logging.getLogger(__name__)


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
        sources = load_files(args.train_file, "train_file", cache_dir)
    else:
        sources = [load_from_hub(args, args.dataset_split)]
    return _prepare(sources, args, [use], rewards, args.max_train_rows)


def load_eval_rows(
    args: DataArguments, uses: Sequence[str], cache_dir: Path, rewards: Sequence[Callable] = ()
) -> Dataset | None:
    """As [`load_train_rows`] for `eval_file` or `eval_split`, checked for all of `uses`; `None` if there are none."""
    if not uses:
        return None
    if args.eval_file is not None:
        sources = load_files(args.eval_file, "eval_file", cache_dir)
    else:
        sources = [load_from_hub(args, args.eval_split)]
    return _prepare(sources, args, uses, rewards, None)


def _prepare(
    sources: list[Source], args: DataArguments, uses: Sequence[str], rewards: Sequence[Callable], max_rows: int | None
) -> Dataset:
    parts, count, checked = [], 0, []
    for source in sources:
        rows = rename(source, args.dataset_columns or {})
        if rewards and "prompt_id" not in rows.column_names:
            rows = rows.add_column("prompt_id", [str(count + index) for index in range(len(rows))])
        count += len(rows)
        if args.drop_equal_pairs:
            rows = _without_equal_pairs(rows, source.name)
        source = Source(source.name, rows)
        columns = [column for use in uses for column in columns_of(source, use)]
        if columns != (checked := checked or columns):
            raise InputError(
                f"{source.name} has {', '.join(columns)}, and {sources[0].name} {', '.join(checked)}: write both alike."
            )
        check_rows(source, [*columns, *(c for reward in rewards for c in columns_needed(reward, rows.column_names))])
        if "sft" in uses:
            check_token_columns(source)
            if columns[:2] == ["prompt", "completion"]:
                check_one_kind(source)
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


def as_conversation(row: dict[str, Any], system_prompt: str | None = None) -> dict[str, Any]:
    """Text columns of a row as messages; columns that are messages already stay."""
    changed: dict[str, Any] = {}
    if isinstance(row.get("prompt"), str):
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        changed["prompt"] = [*system, {"role": "user", "content": row["prompt"]}]
    for column in REPLY_COLUMNS:
        if isinstance(row.get(column), str):
            changed[column] = _reply(row[column])
    if isinstance(row.get("completions"), list):
        changed["completions"] = [_reply(reply) if isinstance(reply, str) else reply for reply in row["completions"]]
    return changed


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
