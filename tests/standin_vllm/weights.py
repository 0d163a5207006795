"""The engine's copy of the model, and what it takes to change it."""

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM


class EngineModel:
    """A transformers model of its own, read from disk, whose weights change by [`load_weights`] only.

    Attributes:
        loaded (`list[str]`): names that `load_weights` took since the prefix cache was last reset, in order.
        asleep (`bool`): whether the memory of the weights is given away.
    """

    def __init__(self, path: str):
        # The random state of the trainer is not the engine's to use.
        with torch.random.fork_rng(devices=[]):
            self.hf = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
        self.loaded: list[str] = []
        self.asleep = False

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        Raises:
            `RuntimeError`: the weights are asleep.
            `KeyError`, `TypeError`, `ValueError`: no such weight, a shard or no tensor, or another shape.
        """
        if self.asleep:
            raise RuntimeError("load_weights while the weights are asleep.")
        parameters = dict(self.hf.named_parameters())
        tied = "lm_head.weight" if self.hf.config.tie_word_embeddings else None
        names = set()
        for name, weight in weights:
            if name == tied:
                continue
            if name not in parameters:
                raise KeyError(f"{name} is not a weight of {type(self.hf).__name__}.")
            if isinstance(weight, DTensor) or not isinstance(weight, torch.Tensor) or weight.is_meta:
                raise TypeError(f"{name} is a {type(weight).__name__}, which holds no whole weight.")
            if weight.shape != parameters[name].shape:
                raise ValueError(f"{name} has shape {tuple(weight.shape)}, not {tuple(parameters[name].shape)}.")
            parameters[name].copy_(weight)
            self.loaded.append(name)
            names.add(name)
        return names

    def discard(self) -> None:
        """Lose the weights, as vLLM's sleep level 2 does."""
        for parameter in self.hf.parameters():
            parameter.fill_(torch.nan)
