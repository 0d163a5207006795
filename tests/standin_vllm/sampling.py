"""Sampling parameters, and the distribution they make of logits."""

import math
from dataclasses import dataclass

import torch


@dataclass
class StructuredOutputsParams:
    regex: str | None = None


@dataclass
class SamplingParams:
    """The parameters that TRL passes; any other keyword is a TypeError, as in vLLM.

    Raises:
        `ValueError`: a value that vLLM refuses, or one that asks for what the stand-in does not have.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    logprobs: int | None = None
    repetition_penalty: float = 1.0
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self):
        wrong = {
            "n": self.n < 1 or (self.greedy and self.n > 1),
            "temperature": self.temperature < 0,
            "top_p": not 0 < self.top_p <= 1,
            "top_k": self.top_k < -1,
            "min_p": not 0 <= self.min_p <= 1,
            "max_tokens": self.max_tokens < 1,
            "repetition_penalty": self.repetition_penalty != 1,
            "structured_outputs": self.structured_outputs is not None,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"{name}={getattr(self, name)!r} is wrong, or more than the stand-in engine has.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def processed_logprobs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Log-probabilities, shape `(B, V)` in nats, of the distribution that is sampled from; logits have the same shape.

    In the order of vLLM's sampler: temperature, min_p, top_k, top_p. Greedy decoding leaves the logits as they are.
    """
    logits = logits.float()
    if params.greedy:
        return logits.log_softmax(-1)
    logits = logits / params.temperature
    if params.min_p > 0:
        least = logits.amax(-1, keepdim=True) + math.log(params.min_p)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if params.top_p < 1:
        ordered, places = logits.softmax(-1).sort(descending=True)
        # A token stays while those before it have less than top_p, so that the first one always does.
        outside = ordered.cumsum(-1) - ordered >= params.top_p
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, places, outside), -torch.inf)
    return logits.log_softmax(-1)
