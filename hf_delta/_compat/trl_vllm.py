"""Private names of TRL's generation with vLLM: which weights it sends, and the engine that they are for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from trl.generation import vllm_generation


# Parameters of each private method that is replaced, as of TRL 1.16. `sync_weights` sends what this one yields.
SEAMS: dict[str, tuple[str, ...]] = {"_iter_named_params": ("self",)}

Weights = Iterator[tuple[str, torch.Tensor]]


def send(generation: "vllm_generation.VLLMGeneration", weights: Callable[[nn.Module, torch.device], Weights]) -> None:
    """Have TRL send `weights(model, device)` whenever it synchronises, in both of its modes, as it does all else.

    By itself TRL merges the adapter in place, reads the parameters, and unmerges.
    """
    generation._iter_named_params = lambda: weights(generation.model, generation.accelerator.device)


@contextmanager
def dense_engine() -> Iterator[None]:
    """Context in which TRL builds a colocated engine with dense weights, whatever the trained model has.

    For a base model in 4 bits TRL has vLLM quantise its copy too, which then takes no dense weights, and of quantised ones
    the codes without their scales.
    """
    if not hasattr(vllm_generation, "LLM"):
        yield
        return
    llm = vllm_generation.LLM

    def dense(*args: Any, quantization: str | None = None, **kwargs: Any) -> Any:
        return llm(*args, quantization=None if quantization == "bitsandbytes" else quantization, **kwargs)

    vllm_generation.LLM = dense
    try:
        yield
    finally:
        vllm_generation.LLM = llm
