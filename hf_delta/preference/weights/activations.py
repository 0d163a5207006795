"""Means of a model's activations, taken by hooks while it runs."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from hf_delta.errors import InputError


# Ends of module names: of projections whose output is meant, and of those whose input is.
_OUTPUTS = {"q": ("q_proj",), "k": ("k_proj",), "v": ("v_proj",)}
_INPUTS = {
    "mlp": ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "mlp.fc2"),
    "v_out": ("attn.o_proj", "attn.c_proj", "attn.out_proj", "attn.dense", "attention.dense"),
}
# GPT-2's one projection for all three.
_FUSED = "attn.c_attn"
_LAYER = re.compile(r"(^|\.)(layers|h)\.\d+$")

KINDS = ("mlp", "q", "k", "v", "v_out", "residual")


@contextmanager
def activation_means(model: nn.Module, kinds: Sequence[str] = KINDS) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Record the mean over the features of activations, of every layer, while the model runs inside of the context.

    The kinds are `mlp` (after the activation function, what goes into the last projection), `q`, `k` and `v` (what comes out of
    the projections), `v_out` (what attention puts into its output projection) and `residual` (what comes out of a layer).
    Modules are found by the ends of their names, as Llama, Qwen, Mistral, Gemma, Phi, GPT-2, GPT-J and OPT and many more have
    them. Adapters belong to the modules that they are put around: their activations are in if they are active. GPT-NeoX and
    others that keep `q`, `k` and `v` in one projection, interleaved, have no `q`, `k` and `v` here.

    Args:
        model (`nn.Module`): A decoder, wrapped or not.
        kinds (`Sequence[str]`): Some of the above.

    Yields:
        For each kind the means `(N, T)` in float32, without gradient, one for each layer in the order in which they run; what
        a second forward gives is appended.

    Raises:
        `InputError`: a kind is unknown, or the model has no such modules.
    """
    means: dict[str, list[torch.Tensor]] = {kind: [] for kind in kinds}
    handles = []
    try:
        for kind in kinds:
            handles += _hooked(model, kind, means[kind])
        yield means
    finally:
        for handle in handles:
            handle.remove()


def _hooked(model: nn.Module, kind: str, means: list[torch.Tensor]) -> list:
    """Hooks that append to `means`, on every module of a kind."""
    if kind not in KINDS:
        raise InputError(f"activations: there is no kind {kind!r}, only {', '.join(KINDS)}.")
    named = {name: module for name, module in model.named_modules() if ".experts." not in name}
    if kind == "residual":
        found = [module for name, module in named.items() if _LAYER.search(name)]
        handles = [module.register_forward_hook(partial(_after, means, kind)) for module in found]
    elif kind in _INPUTS:
        found = [module for name, module in named.items() if name.endswith(_INPUTS[kind])]
        handles = [module.register_forward_pre_hook(partial(_before, means, kind)) for module in found]
    else:
        part = "qkv".index(kind)
        handles = [
            module.register_forward_hook(
                partial(_after, means, kind, part=None if name.endswith(_OUTPUTS[kind]) else part)
            )
            for name, module in named.items()
            if name.endswith((*_OUTPUTS[kind], _FUSED))
        ]
    if not handles:
        raise InputError(
            f"activations: {type(model).__name__} has no modules of the kind {kind!r} that are known by name; leave it out of kinds."
        )
    return handles


def _before(means: list[torch.Tensor], kind: str, module: nn.Module, inputs: tuple) -> None:
    means.append(_mean(inputs[0], kind))


def _after(
    means: list[torch.Tensor], kind: str, module: nn.Module, inputs: tuple, output, part: int | None = None
) -> None:
    output = output[0] if isinstance(output, tuple) else output
    if part is not None:
        if output.shape[-1] != 3 * inputs[0].shape[-1]:
            raise InputError(
                f"activations: this model's {_FUSED} does not hold queries, keys and values of one size; leave {kind!r} out of kinds."
            )
        output = output.chunk(3, dim=-1)[part]
    means.append(_mean(output, kind))


def _mean(activation: torch.Tensor, kind: str) -> torch.Tensor:
    if activation.dim() != 3:
        raise InputError(
            f"activations: {kind!r} is {tuple(activation.shape)} in this model and not (N, T, features); leave it out of kinds."
        )
    return activation.detach().mean(-1, dtype=torch.float32)
