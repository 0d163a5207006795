"""Private names of torch that have no public counterpart."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor


def runs_plainly(module: nn.Module) -> bool:
    """Whether calling a module is its class's `forward` and nothing else: no hooks, no `forward` put on the instance.

    Accelerate's device hooks, profilers and activation recorders all show in one of these places; a computation that
    reads `module.weight` instead of calling the module would pass them by.
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not any(hooks) and "forward" not in module.__dict__


def is_plain_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter and of no subclass, such as shards and packed weights; without memory it may be."""
    return type(tensor) is nn.Parameter or (type(tensor) is FakeTensor and isinstance(tensor, nn.Parameter))


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there is anything behind the shape of a tensor; a plan is made with tensors that have none."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def write_count(tensor: torch.Tensor) -> int:
    """How often autograd saw a tensor being written in place; -1 for inference tensors, which do not count.

    Fused optimizers and writes through `.data` do not count either.
    """
    return -1 if tensor.is_inference() else tensor._version
