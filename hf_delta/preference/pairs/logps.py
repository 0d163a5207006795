"""How likely a student finds the two answers of a pair."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_delta.errors import InputError


# Rows of logits in float32 at a time: 128 MiB for a vocabulary of 131,072.
ROWS = 256


def pair_tokens(tokenizer: PreTrainedTokenizerBase, pair: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Tokens of prompt, chosen and rejected as TRL's `DPOTrainer` makes them.

    A text ends with the end-of-sequence token, a conversation as the chat template ends it. Where tokens merge across the end of
    the prompt, the answers begin where the three texts part.

    Raises:
        InputError: the chat template cannot render the pair.
    """
    prompt, replies = pair["prompt"], [pair["chosen"], pair["rejected"]]
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        texts = [prompt, *(prompt + reply.removesuffix(end) + end for reply in replies)]
        encoded = [tokenizer(text)["input_ids"] for text in texts]
    else:
        try:
            encoded = [
                tokenizer.apply_chat_template(messages, add_generation_prompt=begin, tokenize=True, return_dict=False)
                for messages, begin in ((prompt, True), *((prompt + reply, False) for reply in replies))
            ]
        except Exception as error:
            raise InputError(f"the chat template cannot render prompt_id {pair['prompt_id']!r}: {error}") from error
    shared = len(os.path.commonprefix(encoded))
    return encoded[0][:shared], encoded[1][shared:], encoded[2][shared:]


@torch.no_grad()
def mean_logp(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Mean log-probability of an answer's tokens, nats per token: `1/T sum_t log pi(y_t | x, y_<t)`.

    A first token without anything before it has no probability and is left out.

    Args:
        model: in evaluation mode.
        prompt (sequence of `int`, length P): tokens before the answer.
        answer (sequence of `int`, length T): its tokens.
    """
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    first = max(len(prompt), 1)
    logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - first + 1).logits[0, :-1]
    losses = [
        cross_entropy(rows.float(), targets, reduction="none")
        for rows, targets in zip(logits.split(ROWS), ids[0, first:].split(ROWS))
    ]
    return -torch.cat(losses).mean().item()
