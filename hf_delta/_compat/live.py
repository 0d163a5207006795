"""Bytes of tensors that are alive, by private names of torch, and tensors that have shapes and no memory."""

import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts bytes of the storages that operations inside made and that are still there.

    Attributes:
        now (`int`): Bytes at this moment.
        peak (`int`): Most bytes at any moment since `peak` was set last.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return found

    def count(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._see(tensor.untyped_storage())

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size


class _GroupedProducts(TorchDispatchMode):
    """Products of experts in any dtype: without memory torch knows their shapes for bfloat16 alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
            return function(*args, **(kwargs or {}))
        left, right, *more = args
        found = function(left.to(torch.bfloat16), right.to(torch.bfloat16), *more, **(kwargs or {}))
        return torch.empty_like(found, dtype=left.dtype)


@contextmanager
def shapes_only() -> Iterator[LiveBytes]:
    """Context in which tensors have shapes, dtypes and no memory, and their bytes are counted as if they had."""
    counter = LiveBytes()
    # What cannot be done without values is an exception, and a traceback on stderr besides.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    was, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(), _GroupedProducts(), counter:
            yield counter
    finally:
        log.disabled = was


def give_shapes(model: torch.nn.Module) -> None:
    """Inside of [`shapes_only`]: put tensors on the CPU in the place of a model's meta tensors, with the same shapes."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            # Tied weights stay tied.
            if id(parameter) not in made:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
