"""When the norm of a DoRA layer may be used again.

The norm depends on `A`, `B` and `W`. A change of them cannot be seen in all cases: fused optimizers and writes through
`.data` leave no trace on a tensor. So a norm is used again only where one of these rules says that nothing can have
changed, and otherwise computed in every forward:

* **training**: `A`, `B` and the magnitude are parameters of a `torch.optim` optimizer whose step was seen to happen, and
  it has made no step since. Sharded training (FSDP, DeepSpeed) computes on other tensors than its optimizer updates,
  optimizers of another kind are not seen, and both fall under "in every forward";
* **a rollout**: gradients are off inside [`reuse_dora_norms`], which `generate` opens;
* **evaluation on the CPU**: gradients are off, and `A` and `B` compare equal to what the norm was computed from.

In all of them the tensors must also be the same storage with the same count of writes. On the CPU, where comparing does
not wait for a device, the values are compared in training too.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_delta._compat.torch import has_values, write_count
from hf_delta.adapters.dora.base_weight import base_square_norms, base_times_transposed, stored_weight
from hf_delta.adapters.dora.functions import usable_norm
from hf_delta.ops.norms import factored_row_norms


class StepWatch:
    """Counts the steps of all `torch.optim` optimizers and knows which parameters they update."""

    def __init__(self):
        self.steps = 0
        self._handle = None
        self._owners: dict[int, tuple[weakref.ref, weakref.ref]] = {}

    def start(self) -> None:
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(self._after_step)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._owners.clear()

    def covers(self, *parameters: torch.Tensor) -> bool:
        """Whether each of these very objects is updated by a living optimizer that was seen to make a step."""
        for parameter in parameters:
            known, optimizer = self._owners.get(id(parameter), (None, None))
            if known is None or known() is not parameter or optimizer() is None:
                return False
        return True

    def _after_step(self, optimizer, args, kwargs) -> None:
        self.steps += 1
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        new = [p for p in parameters if not self.covers(p)]
        if new:
            self._owners = {key: refs for key, refs in self._owners.items() if refs[0]() is not None}
            owner = weakref.ref(optimizer)
            self._owners.update((id(p), (weakref.ref(p), owner)) for p in new)


class Seen:
    """What a tensor was: its storage, its place in it, and how often it had been written."""

    __slots__ = ("count", "pointer", "storage")

    def __init__(self, tensor: torch.Tensor):
        tensor = _local(tensor)
        # While it is known to live, no other storage has its address.
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.pointer, self.count = tensor.data_ptr(), write_count(tensor)

    def is_still(self, tensor: torch.Tensor) -> bool:
        tensor = _local(tensor)
        return (
            self.pointer == tensor.data_ptr() and self.count == write_count(tensor) >= 0 and not self.storage.expired()
        )


@dataclass
class KnownNorm:
    """A norm, what it was computed from, and where it may be used again."""

    norm: torch.Tensor
    scaling: float = 0.0
    steps: int = -1
    scope: int = 0
    seen: tuple[Seen, ...] = ()
    # Outside of its scope too; with `copies`, after a comparison with them.
    lasting: bool = False
    copies: tuple[torch.Tensor, ...] | None = None
    some_zero: bool | None = None


class NormCache:
    """Norms `n` of DoRA layers, `(o,)`, from [`usable_norm`], and `||W_i||^2` of their base layers."""

    def __init__(self):
        self.watch = StepWatch()
        self.enabled = True
        self._norms: weakref.WeakKeyDictionary[nn.Module, KnownNorm] = weakref.WeakKeyDictionary()
        self._squares: weakref.WeakKeyDictionary[nn.Module, tuple[Seen, torch.Tensor]] = weakref.WeakKeyDictionary()
        # What is kept for the length of a rollout besides norms, by the `id` of what it belongs to.
        self.plans: dict[int, Any] = {}
        # The number of the current rollout, 0 outside of one.
        self.scope = self._scopes = self._depth = 0

    def start(self, enabled: bool) -> None:
        self.enabled = enabled
        self._norms.clear()
        self.watch.start()

    def stop(self) -> None:
        self.watch.stop()
        self._norms.clear()
        self._squares.clear()

    def drop(self, layer: nn.Module) -> None:
        """Forget the norm of one DoRA layer."""
        self._norms.pop(layer, None)

    @contextmanager
    def rollout(self) -> Iterator[None]:
        if self._depth == 0 and self.enabled:
            self._scopes += 1
            self.scope = self._scopes
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.scope = 0
                self.plans.clear()

    def known(
        self, layer: nn.Module, base_layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> KnownNorm:
        """The norm of `W + s B A`, computed now unless a rule of this module allows the last one.

        Args:
            layer: the module that holds the magnitude, as `weight`.
            base_layer: the module that holds `W`.
            a, b: the parameters `A`, `(r, i)` and `B`, `(o, r)`.
            scaling: `s`.
        """
        last = self._norms.get(layer)
        tensors = (a, b, layer.weight, stored_weight(base_layer))
        if last is not None and last.steps == self.watch.steps and last.scaling == scaling:
            if all(map(Seen.is_still, last.seen, tensors)):
                if last.scope and last.scope == self.scope and not torch.is_grad_enabled():
                    return last
                if last.lasting and self._may_last(layer, a, b):
                    if last.copies is None or all(map(torch.equal, last.copies, tensors)):
                        last.scope = self.scope
                        return last
        return self._compute(layer, base_layer, tensors, scaling)

    def some_zero(self, known: KnownNorm, magnitude: torch.Tensor) -> bool:
        """Whether any magnitude is exactly 0; asked of a device once per norm that lasts."""
        if known.some_zero is None:
            known.some_zero = has_values(magnitude) and bool((magnitude == 0).any())
        return known.some_zero

    def _compute(
        self, layer: nn.Module, base_layer: nn.Module, tensors: tuple[torch.Tensor, ...], scaling: float
    ) -> KnownNorm:
        a, b = tensors[:2]
        known = KnownNorm(self.norm(layer, base_layer, a, b, scaling))
        rolling = self.enabled and self.scope > 0 and not torch.is_grad_enabled()
        lasting = self.enabled and self._may_last(layer, a, b)
        if not rolling and not lasting:
            self.drop(layer)
            return known
        known.scaling, known.steps, known.scope, known.lasting = scaling, self.watch.steps, self.scope, lasting
        known.seen = tuple(map(Seen, tensors))
        if lasting and _comparable(a):
            known.copies = tuple(tensor.detach().clone() for tensor in tensors[:3])
        self._norms[layer] = known
        return known

    def norm(
        self, layer: nn.Module, base_layer: nn.Module, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """The same, computed now."""
        transposed = layer.fan_in_fan_out
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            squares = self._square_norms(base_layer, transposed)
            products = base_times_transposed(base_layer, a, transposed)
            return usable_norm(factored_row_norms(squares, products, a, b, scaling))

    def _may_last(self, layer: nn.Module, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether a norm computed now can serve a later forward outside of this rollout."""
        if layer.training:
            return self.watch.covers(a, b, layer.weight)
        return not torch.is_grad_enabled() and _comparable(a)

    def _square_norms(self, base_layer: nn.Module, transposed: bool) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return base_square_norms(base_layer, transposed)
        weight = stored_weight(base_layer)
        seen, squares = self._squares.get(base_layer, (None, None))
        if seen is None or not seen.is_still(weight):
            squares = base_square_norms(base_layer, transposed)
            self._squares[base_layer] = Seen(weight), squares
        return squares


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _comparable(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


NORMS = NormCache()


def reuse_dora_norms():
    """Context in which the norms of DoRA layers are computed once, as long as gradients are off; for rollouts.

    `generate` of every transformers and PEFT model is such a context while fast DoRA is on. Inside, adapter weights may be
    loaded into, merged, disabled and switched, but not written through `.data` or exchanged for other parameters.
    """
    return NORMS.rollout()
