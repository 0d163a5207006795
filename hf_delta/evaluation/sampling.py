"""Completions of prompts by transformers' `generate`, which disturb neither the model nor the random state."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_delta.errors import InputError


@dataclass(frozen=True)
class Completions:
    """What one call of [`complete`] returns, for B prompts."""

    ids: list[list[int]]  # up to and with the end-of-sequence token
    texts: list[str]  # without special tokens
    truncated: list[bool]  # whether max_new_tokens cut it


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    """Tokens of a prompt; messages go through the chat template, with the beginning of an answer after them.

    Raises:
        InputError: if the prompt is a conversation and the tokenizer has no chat template, or cannot render it.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    try:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    except Exception as error:
        reason = "the tokenizer has none" if "chat_template is not set" in str(error) else error
        raise InputError(f"The chat template cannot render the prompt {prompt!r:.200}: {reason}") from error


def sampling_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float, max_new_tokens: int
) -> GenerationConfig:
    """Sampling from the model's own distribution at a temperature, or greedy decoding at 0.

    Nucleus and top-k filters and the repetition penalty that the model's generation config may ask for are off: pass@k
    is about the model. A completion ends at the tokenizer's or the generation config's end-of-sequence tokens.

    Raises:
        InputError: if there is no end-of-sequence token.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends = [tokenizer.eos_token_id, *ends]
    if not ends:
        raise InputError(
            "Neither the tokenizer nor the generation config of the model has an eos token: nothing would end."
        )
    pad = tokenizer.pad_token_id
    options: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        repetition_penalty=1.0,
        disable_compile=True,
        **options,
    )


@torch.no_grad()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], config: GenerationConfig
) -> Completions:
    """One completion per prompt, in one batch.

    Args:
        model: in evaluation mode, see [`undisturbed`].
        tokenizer: to turn tokens into text.
        prompts (`list[list[int]]`, of length B): tokens; padded on the left here.
        config: from [`sampling_config`].

    Raises:
        InputError: if the model computes NaN.
    """
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[config.pad_token_id] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([_RefuseNaN()]),
    )
    ids, truncated = [], []
    ends = set(config.eos_token_id)
    for row in output[:, longest:].tolist():
        # What follows the first end is padding, which may be the same token.
        length = next((i + 1 for i, token in enumerate(row) if token in ends), None)
        ids.append(row[:length])
        truncated.append(length is None)
    return Completions(ids, tokenizer.batch_decode(ids, skip_special_tokens=True), truncated)


class _RefuseNaN(LogitsProcessor):
    """Greedy decoding would take a NaN for the most likely token, and write nonsense without a word."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if scores.isnan().any():
            raise InputError(
                "The model computes NaN: its weights are damaged, or overflow in this dtype or on this device."
            )
        return scores


@contextmanager
def undisturbed(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Evaluation mode and torch's random state from `seed` inside; both as they were afterwards, module by module."""
    training = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
