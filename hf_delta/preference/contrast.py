"""Token weights of TIS-DPO from two contrast models, as columns of a data set."""

from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, release_memory
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_delta._compat.kernels import has_triton, head_arguments, scores_function
from hf_delta._compat.transformers import loaded_whole
from hf_delta.errors import InputError
from hf_delta.evaluation.loading import load_model_and_tokenizer
from hf_delta.evaluation.sampling import undisturbed
from hf_delta.preference.pair_data import WEIGHT_COLUMNS
from hf_delta.preference.pairs.generate import check_tokens
from hf_delta.preference.weights.tis import contrast_weights


SIDES = ("chosen", "rejected")
COLUMNS = tuple(WEIGHT_COLUMNS)

Model = PreTrainedModel | PeftModel | str | Path


def add_contrast_weights(
    dataset: Dataset,
    positive: Model,
    negative: Model,
    *,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[list], list] | None = None,
    progress: bool = True,
    vocab_size: int | None = None,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    **transform: Any,
) -> Dataset:
    """Add what two models find of each token, `log pi_+(y_t) - log pi_-(y_t)`, as weights `chosen_weights`, `rejected_weights`.

    The models run once over the data set, one after the other, without gradients. [`contrast_weights`] makes the weights.
    With several processes each scores the rows `process_index::num_processes`, and all get the same columns.
    https://arxiv.org/abs/2410.04350

    Args:
        dataset (`datasets.Dataset`): with `prompt_ids`, `chosen_ids`, `rejected_ids`, as TRL's `DPOTrainer` makes them.
        positive (`PreTrainedModel`, `PeftModel`, `str` or `Path`):
            The model that makes good tokens likelier, or a directory of a model or adapter, which is loaded to this
            process's device and freed afterwards. A model stays where it is, as it is.
        negative (`PreTrainedModel`, `PeftModel`, `str` or `Path`): The model that makes bad tokens likelier.
        batch_size (`int`): pairs at a time.
        gather (`Callable`, *optional*, defaults to `accelerate.utils.gather_object`): from a list of each process, all of them.
        progress (`bool`, *optional*, defaults to `True`): whether the first process shows a bar.
        vocab_size (`int`, *optional*): rows of the policy's input embeddings, which both models must have.
        max_length (`int`, *optional*): cut prompt and completion as TRL's collator does. What is cut off, and a token with
            nothing before it, counts as equally likely under both.
        truncation_mode (`str`, *optional*, defaults to `keep_start`): or `keep_end`.
        **transform: further arguments of [`contrast_weights`].

    Raises:
        InputError: the data set lacks tokens or has weights, a model cannot be loaded, has another vocabulary or gives a
            log-probability that is no finite number, or both are one.
    """
    _check(dataset, positive, negative, batch_size, truncation_mode)
    _check_transform(transform)
    share = _Share(dataset.select(range(process_index, len(dataset), num_processes)), max_length, truncation_mode)
    weights, fault = None, None
    try:
        logps = [
            _logps(model, name, share, 2 * batch_size, vocab_size, progress and process_index == 0)
            for name, model in {"positive": positive, "negative": negative}.items()
        ]
        weights = [_weights([found[place::2] for found in logps], side, transform) for place, side in enumerate(SIDES)]
    except InputError as error:
        if num_processes == 1:
            raise
        # Raised by all below: who waits for a process that gave up would wait for ever.
        fault = str(error)
    shares = [(weights, fault)]
    if num_processes > 1:
        shares = (gather_object if gather is None else gather)(shares)
    if faults := [text for _, text in shares if text is not None]:
        raise InputError(faults[0])
    for place, column in enumerate(COLUMNS):
        dataset = dataset.add_column(column, _interleaved([found[place] for found, _ in shares]))
    return dataset


class _Share:
    """The completions of the rows that one process scores: chosen and rejected of the first, of the second, and so on."""

    def __init__(self, rows: Dataset, max_length: int | None, truncation_mode: str) -> None:
        self._rows = rows.with_format(None)
        keep_end = truncation_mode == "keep_end" and max_length is not None
        self._kept = slice(-max_length, None) if keep_end else slice(max_length)
        prompts, *completions = (_lengths(rows, f"{part}_ids") for part in ("prompt", *SIDES))
        # Tokens of each completion, and of each text as the model reads it.
        self.lengths = np.stack(completions, axis=1).reshape(-1)
        wholes = self.lengths + prompts.repeat(2)
        self.wholes = wholes if max_length is None else wholes.clip(max=max_length)

    def __getitem__(self, place: int) -> tuple[list[int], int, int]:
        """Token ids of a text; where the first scored one is, which has one before it; and where that is in the completion."""
        row = self._rows[place // 2]
        prompt = row["prompt_ids"]
        ids = prompt + row[f"{SIDES[place % 2]}_ids"]
        kept = range(len(ids))[self._kept]
        first = max(len(prompt), kept.start + 1)
        return ids[self._kept], first - kept.start, first - len(prompt)


def _logps(
    model: Model, name: str, share: _Share, batch_size: int, vocab_size: int | None, progress: bool
) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each completion, float32."""
    loaded = isinstance(model, str | Path)
    network = _load(model, name) if loaded else model
    found = [np.zeros(length, np.float32) for length in share.lengths]
    # The longest first: what does not fit in memory fails at once.
    order = np.argsort(-share.wholes, kind="stable").tolist()
    bar = tqdm(
        total=int(share.wholes.sum()),
        desc=f"{name} model",
        unit="token",
        unit_scale=True,
        disable=not progress,
    )
    _check_vocabulary(network, name, model if loaded else None, vocab_size)
    with undisturbed(network, seed=0), bar:
        for places in (order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)):
            texts = [share[place] for place in places]
            check_tokens(network, [max(ids, default=0) for ids, *_ in texts], f"the {name} model")
            for place, (_, _, start), values in zip(places, texts, _batch_logps(network, texts)):
                if not np.isfinite(values).all():
                    raise InputError(
                        f"The {name} model gives a log-probability that is no finite number: its weights are damaged, or "
                        "overflow in their dtype."
                    )
                found[place][start : start + len(values)] = values
            bar.update(int(share.wholes[places].sum()))
    if loaded:
        del network
        release_memory()
    return found


@torch.no_grad()
def _batch_logps(model: PreTrainedModel | PeftModel, texts: list[tuple[list[int], int, int]]) -> list[np.ndarray]:
    """Log-probabilities of the tokens of each text from the first scored one on."""
    shape = len(texts), max(len(ids) for ids, *_ in texts)
    tokens, real, scored = torch.zeros(shape, dtype=torch.long), torch.zeros(shape).long(), torch.zeros(shape).bool()
    for row, (ids, first, _) in enumerate(texts):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        real[row, : len(ids)] = 1
        scored[row, first : len(ids)] = True
    counts = scored.sum(dim=1).tolist()
    if not any(counts):
        return [np.zeros(0, np.float32)] * len(texts)
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {"input_ids": tokens.to(network.device), "attention_mask": real.to(network.device)}
    hidden = network.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    head = head_arguments(network)
    device = head["head_weight"].device
    scores = scores_function("trl" if has_triton(device) else "chunked", device, kl=False)
    logps = scores(
        hidden.to(device)[scored[:, 1:].to(device)], targets=tokens[:, 1:][scored[:, 1:]].to(device), **head
    ).logps
    return np.split(logps.float().cpu().numpy(), np.cumsum(counts))[:-1]


def _weights(logps: list[list[np.ndarray]], side: str, transform: dict[str, Any]) -> list[np.ndarray]:
    """Weights of the tokens of each completion of a side, from those of both models."""
    positive, negative = (torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *found])) for found in logps)
    weights = contrast_weights(positive, negative, chosen=side == "chosen", **transform).float().numpy()
    return np.split(weights, np.cumsum([len(found) for found in logps[0]]))[:-1]


def _interleaved(shares: list[list[np.ndarray]]) -> pa.ListArray:
    """A column from the rows of each process, of which process p has the rows p, p + P, p + 2P, ..."""
    rows: list[np.ndarray] = [None] * sum(map(len, shares))
    for process, share in enumerate(shares):
        rows[process :: len(shares)] = share
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.concatenate([np.zeros(0, np.float32), *rows])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, pa.float32()))


def _lengths(rows: Dataset, column: str) -> np.ndarray:
    tables = rows.select_columns([column]).with_format("arrow").iter(1000)
    found = [table[column].combine_chunks().value_lengths().to_numpy(zero_copy_only=False) for table in tables]
    return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)


def _load(path: str | Path, name: str) -> PreTrainedModel | PeftModel:
    try:
        # Each process runs it on rows of its own.
        with loaded_whole():
            return load_model_and_tokenizer(path, device=str(PartialState().device))[0]
    except InputError as error:
        raise InputError(f"The {name} contrast model: {error}") from error


def _check_vocabulary(
    network: PreTrainedModel | PeftModel, name: str, path: str | Path | None, vocab_size: int | None
) -> None:
    if isinstance(network, PeftModel) and network.active_peft_config.is_prompt_learning:
        raise InputError(
            f"The {name} contrast model is a tuned prompt, which is not supported: merge or choose another adapter."
        )
    found = network.get_input_embeddings().weight.shape[0]
    if vocab_size is not None and found != vocab_size:
        where = "" if path is None else f" in {path}"
        raise InputError(
            f"The {name} contrast model{where} has {found} token embeddings and the policy {vocab_size}: token weights can "
            "only be had from models with the policy's vocabulary."
        )


def _check_transform(transform: dict[str, Any]) -> None:
    """Refuse wrong arguments before two models run and not afterwards."""
    known = [
        name
        for name, parameter in signature(contrast_weights).parameters.items()
        if parameter.default is not Parameter.empty
    ]
    if unknown := [name for name in transform if name not in known]:
        raise InputError(f"contrast weights: {', '.join(unknown)} is none of {', '.join(known)}.")
    contrast_weights(torch.zeros(1), torch.zeros(1), chosen=True, **transform)


def _check(dataset: Dataset, positive: Model, negative: Model, batch_size: int, truncation_mode: str) -> None:
    if not isinstance(dataset, Dataset):
        raise InputError("Contrast models score a whole data set in advance: it must be a `Dataset`, not a stream.")
    if missing := [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name not in dataset.column_names]:
        raise InputError(f"The data set has no column {', '.join(missing)}: it must hold pairs as TRL tokenizes them.")
    if present := [name for name in COLUMNS if name in dataset.column_names]:
        raise InputError(
            f"The data set has {' and '.join(present)} already: drop them, or leave out the contrast models and take the columns."
        )
    named = isinstance(positive, str | Path) and isinstance(negative, str | Path)
    # runs/a and runs/a/ are the same directory.
    if Path(positive) == Path(negative) if named else positive is negative:
        raise InputError(
            "The positive and the negative contrast model are one and the same: every weight would be that of 0."
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, not {batch_size}.")
    if truncation_mode not in ("keep_start", "keep_end"):
        raise InputError(f"truncation_mode: {truncation_mode!r} is neither keep_start nor keep_end.")
