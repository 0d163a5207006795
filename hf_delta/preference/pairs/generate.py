"""Greedy answers of one model, batch by batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.errors import InputError
from hf_delta.evaluation.sampling import complete, prompt_ids, sampling_config, undisturbed
from hf_delta.preference.pairs.partial import Response


def encode_prompts(tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], option: str) -> list[list[int]]:
    """Tokens of each prompt for one model.

    Raises:
        InputError: a prompt has no tokens, or is a conversation that the tokenizer cannot render.
    """
    encoded = []
    for row in rows:
        try:
            ids = prompt_ids(tokenizer, row["prompt"])
        except InputError as error:
            raise InputError(f"{option}, prompt_id {row['prompt_id']!r}: {error}") from error
        if not ids:
            raise InputError(f"{option}: the prompt of prompt_id {row['prompt_id']!r} has no tokens.")
        encoded.append(ids)
    return encoded


def plan_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of prompts, the longest together and first: what does not fit into memory does not fit at once."""
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batches: list[list[int]],
    max_new_tokens: int,
    option: str,
) -> Iterator[tuple[list[int], list[Response]]]:
    """The greedy answers to each batch of prompts: argmax of the model's own logits, without penalties or filters.

    Args:
        prompts (sequence of B' token lists): all of them.
        batches (`list[list[int]]`): positions of those to answer together.

    Yields:
        the positions of a batch and its [`Response`]s.

    Raises:
        InputError: a prompt leaves no room or has tokens that the model does not, the model computes NaN, or a batch does not
            fit into memory.
    """
    _check_room(model, prompts, max_new_tokens, option)
    config = sampling_config(model, tokenizer, 0.0, max_new_tokens)
    for positions in batches:
        try:
            with undisturbed(model, seed=0):
                found = complete(model, tokenizer, [list(prompts[position]) for position in positions], config)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"{option}: {len(positions)} answers at a time do not fit into memory. The answers so far are kept: the same "
                "command with a smaller --batch-size goes on."
            ) from error
        except InputError as error:
            raise InputError(f"{option}: {error}") from error
        yield positions, [Response(*parts) for parts in zip(found.texts, map(len, found.ids), found.truncated)]


def check_tokens(model: PreTrainedModel, ids: Sequence[int], option: str) -> None:
    """Refuse tokens that a model has no embedding for, which would be an index error, on a GPU without words.

    Raises:
        InputError: there is one.
    """
    known = model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= known:
        raise InputError(
            f"{option}: the tokenizer gives token {max(ids)}, and the model has {known} embeddings: they do not belong together."
        )


def _check_room(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, option: str) -> None:
    longest = max(map(len, prompts))
    check_tokens(model, [max(ids) for ids in prompts], option)
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and longest + max_new_tokens > room:
        raise InputError(
            f"{option}: the longest prompt has {longest} tokens, and with --max-new-tokens {max_new_tokens} more it passes the "
            f"{room} positions of the model; write at most {room - longest}."
            if longest < room
            else f"{option}: the longest prompt has {longest} tokens, and the model {room} positions: leave out such prompts."
        )
