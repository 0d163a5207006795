"""One batch of requests, decoded together with left padding and a cache."""

import torch
from transformers import DynamicCache, PreTrainedModel

from tests.standin_vllm.outputs import CompletionOutput, Logprob
from tests.standin_vllm.sampling import SamplingParams, processed_logprobs


class Row:
    """One completion while it grows."""

    def __init__(self, limit: int, stop: set[int]):
        self.limit, self.stop = limit, stop
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None

    def add(self, token: int, logprobs: dict[int, Logprob]) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprobs)
        if token in self.stop:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"

    def output(self, index: int, with_logprobs: bool) -> CompletionOutput:
        total = sum(table[token].logprob for token, table in zip(self.token_ids, self.logprobs))
        return CompletionOutput(
            index, "", self.token_ids, total, self.logprobs if with_logprobs else None, self.finish_reason
        )


@torch.no_grad()
def decode(
    model: PreTrainedModel, prompts: list[list[int]], rows: list[Row], params: SamplingParams, rng: torch.Generator
) -> None:
    """Let the row of each prompt grow to its end."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    while True:
        logits = model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        if logits.isnan().any():
            raise RuntimeError("The weights were discarded by sleep(level=2), and not all were loaded again.")
        logprobs = processed_logprobs(logits, params)
        tokens = logprobs.argmax(-1) if params.greedy else torch.multinomial(logprobs.exp(), 1, generator=rng)[:, 0]
        for row, token, table in zip(rows, tokens.tolist(), tables(logprobs, tokens, params.logprobs or 0)):
            if row.finish_reason is None:
                row.add(token, table)
        if all(row.finish_reason for row in rows):
            return
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(ids)], 1)


def tables(logprobs: torch.Tensor, tokens: torch.Tensor, top: int) -> list[dict[int, Logprob]]:
    """The sampled token and the `top` likeliest ones of each row, with log-probability and rank (1 is the likeliest)."""
    wanted = torch.cat([tokens[:, None], logprobs.topk(top).indices], 1)
    found = logprobs.gather(1, wanted)
    ranks = (logprobs[:, None] > found[..., None]).sum(-1) + 1
    return [
        {token: Logprob(value, rank) for token, value, rank in zip(*row)}
        for row in zip(wanted.tolist(), found.tolist(), ranks.tolist())
    ]
