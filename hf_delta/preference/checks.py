"""What a configuration asks of data and models: checked before anything is computed."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from hf_delta.errors import InputError
from hf_delta.paths import expanded
from hf_delta.preference.config import TOKEN_OBJECTIVES, DeltaDPOConfig
from hf_delta.preference.list_data import add_labels, check_list_rows
from hf_delta.preference.lists import LIST_LOSSES
from hf_delta.preference.pair_data import (
    SAMPLE_KEY,
    WEIGHT_COLUMNS,
    check_pair_rows,
    check_weight_lengths,
    with_sample_keys,
)
from hf_delta.preference.weights import TokenWeights


# The data set whose samples have multipliers.
TRAINED = "train_dataset"


def check_plain_config(config: Any) -> None:
    """Refuse losses of ours in TRL's own configuration, which has none of their keys.

    Raises:
        `InputError`: there is one.
    """
    names = [
        name for name in getattr(config, "loss_type", None) or () if name in TOKEN_OBJECTIVES or name in LIST_LOSSES
    ]
    if names:
        raise InputError(f"loss_type: {names[0]} needs a DeltaDPOConfig, and args is a plain {type(config).__name__}.")


def data_sets(train: Any, evaluation: Any) -> Iterator[tuple[str, Any]]:
    """Names and rows of the data sets that a trainer is given."""
    if train is not None:
        yield "train", train
    if isinstance(evaluation, dict):
        yield from evaluation.items()
    elif evaluation is not None:
        yield "eval", evaluation


def uses_columns(rule: TokenWeights | None) -> bool:
    """Whether weights must be in the data set; those of contrast models are made."""
    return rule is not None and "columns" in rule.needs and not getattr(rule, "contrast", None)


def needed_columns(config: DeltaDPOConfig, rule: TokenWeights | None) -> tuple[str, ...]:
    """Columns that a batch is made of, besides TRL's."""
    columns = ("completion_ids", "list_labels") if config.uses_lists else ()
    if rule is not None and "columns" in rule.needs:
        columns += tuple(WEIGHT_COLUMNS)
    return (*columns, SAMPLE_KEY) if config.feasible else columns


def check_rows(rows: Any, source: str, config: DeltaDPOConfig, rule: TokenWeights | None) -> Any:
    """Refuse the first row that the loss cannot use; a stream is checked as it comes by.

    Returns:
        The rows; of an `IterableDataset` another one.

    Raises:
        `InputError`: see [`check_pair_rows`] and [`~hf_delta.preference.list_data.check_list_rows`]; or there are images.
    """
    if not isinstance(rows, (Dataset, IterableDataset)):
        return rows
    names = rows.column_names or list(next(iter(rows), {}))
    if images := {"image", "images"} & set(names):
        raise InputError(
            f"{source} has {sorted(images)[0]!r}: losses of hf_delta are for texts. Take a loss_type of TRL's, without "
            "token_weights and feasible."
        )
    column = config.sample_id_column
    if column is not None and source == TRAINED and column not in names:
        raise InputError(f"sample_id_column: {source} has no column {column!r}; it has {', '.join(sorted(names))}.")
    if config.uses_lists:
        _check_kind(names, "completions", source, f"loss_type: {config.loss_type[0]} takes rows with completions")
        return check_list_rows(rows, source, rescale=config.list_rescale)
    _check_kind(names, "chosen", source, f"loss_type: {config.loss_type[0]} takes rows with chosen and rejected")
    return check_pair_rows(rows, source, weights=uses_columns(rule))


def _check_kind(names: list[str], wanted: str, source: str, what: str) -> None:
    if wanted in names:
        return
    other = {"completions": "lists_from_pairs makes lists of pairs", "chosen": "list losses take lists"}[wanted]
    raise InputError(f"{source} has no column {wanted!r}, only {', '.join(sorted(names))}. {what}; {other}.")


def prepared(
    rows: Any, source: str, config: DeltaDPOConfig, rule: TokenWeights | None, tokenized: Callable[..., Any]
) -> Any:
    """Rows that are checked, with tokens and all columns that a batch is made of."""
    if config.feasible and source == TRAINED:
        rows = with_sample_keys(rows, config.sample_id_column)
    if config.uses_lists:
        rescale = {"rescale": config.list_rescale}
        return tokenized(rows.map(add_labels, fn_kwargs=rescale), lists=True)
    rows = tokenized(rows)
    return check_weight_lengths(rows, source) if uses_columns(rule) else rows


def check_contrast(rule: TokenWeights | None) -> None:
    """Refuse contrast models that are not there, before the policy is loaded.

    Raises:
        `InputError`: one of them is no directory.
    """
    for name in ("positive", "negative"):
        path = (getattr(rule, "contrast", None) or {}).get(name)
        if path is not None and not expanded(path).is_dir():
            raise InputError(
                f"token_weights_kwargs: {name}: {path} is no directory. Train that model first, or correct the path."
            )


def check_models(policy: torch.nn.Module, reference: torch.nn.Module | None, router_loss: bool) -> None:
    """Refuse models whose tokens cannot be compared, or whose loss has a term that is not in ours.

    Raises:
        `InputError`: the vocabularies differ, or the load-balancing loss of a mixture of experts is on.
    """
    if router_loss:
        raise InputError(
            "the load-balancing loss of a mixture of experts is not in the losses of hf_delta, nor in logps_kernel: chunked. "
            "Write router_aux_loss_coef: 0.0, or take a loss_type of TRL's with logps_kernel: trl."
        )
    if reference is None:
        return
    sizes = [model.config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the policy has a vocabulary of {sizes[0]} tokens and the reference one of {sizes[1]}: log-probabilities of "
            "different tokens cannot be compared. Take a ref_model with the policy's tokenizer."
        )
