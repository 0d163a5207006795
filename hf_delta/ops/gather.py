"""Whole tensors out of parameters that may be sharded."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether a parameter belongs to DeepSpeed ZeRO-3, which takes its memory back where it is whole for a while."""
    return hasattr(tensor, "ds_id")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a `DTensor` (FSDP2, tensor parallel) or a parameter that DeepSpeed has partitioned."""
    return isinstance(tensor, DTensor) or (is_partitioned(tensor) and tensor.numel() != tensor.ds_numel)


def full_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape of the whole of a tensor, also of what DeepSpeed has partitioned, without gathering it."""
    return tensor.ds_shape if is_partitioned(tensor) else tensor.shape


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, detached; a plain tensor is returned as it is.

    Collective where the tensor is sharded: every rank calls it. What DeepSpeed ZeRO-3 has partitioned comes as a copy; inside
    of a forward it gathers by itself.
    """
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor()
    if is_sharded(tensor):
        with gathered(tensor):
            return tensor.detach().clone()
    return tensor.detach()


def whole(tensor: torch.Tensor | None, trained: bool) -> torch.Tensor | None:
    """A `DTensor` in one piece, from which gradients find their way back if it is `trained`; all else as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor() if trained and tensor.requires_grad else full_tensor(tensor)


@contextmanager
def gathered(*tensors: torch.Tensor | None) -> Iterator[None]:
    """Parameters that DeepSpeed ZeRO-3 has partitioned, whole for a while and for reading; others, and `None`, as they are.

    Collective where a parameter is partitioned.
    """
    partitioned = {id(t): t for t in tensors if t is not None and is_partitioned(t) and is_sharded(t)}
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(partitioned.values())):
        yield


def frozen_parameter(tensor: torch.Tensor, like: torch.Tensor) -> nn.Parameter:
    """A parameter that takes no gradient unless `like` does, with its dtype and device."""
    return nn.Parameter(tensor.to(like.device, like.dtype), requires_grad=like.requires_grad)


def into_shards(*modules: nn.Module) -> None:
    """Have FSDP2 take back the whole parameters that it left in modules after a forward, as it does in the root.

    What is written to those, or put in their place, would be lost with the next exchange. Not for use inside a forward.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for module in modules:
            # FSDP2's hook on this public method is the one way to its parameters from a module inside of it.
            module.state_dict()


@contextmanager
def whole_parameters(*modules: nn.Module) -> Iterator[None]:
    """Let modules hold whole copies of their sharded parameters for a while, then the same parameter objects again.

    For reading: what is written to the copies is lost. Collective where a parameter is sharded.
    """
    kept = []
    for root in modules:
        for module in root.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(parameter, DTensor):
                    kept.append((module, name, parameter))
                    setattr(module, name, nn.Parameter(full_tensor(parameter), requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in kept:
            setattr(module, name, parameter)
