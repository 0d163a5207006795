"""Decoding a token takes less time per layer than looking at a layer from all sides: in a rollout that is done once."""

import weakref

import torch
from torch import nn
from torch.nn.functional import linear

from hf_delta._compat.dora import mode_of, write_counts
from hf_delta.adapters.dora.cache import NORMS
from hf_delta.adapters.dora.functions import bias_shift, gain


class RolloutPlan:
    """All that one LoRA layer computes with during one rollout.

    Good for the rollout in which it was made, while the layer keeps its mode, its active adapter and its scaling, nothing
    is merged or disabled, no optimizer steps and no adapter tensor is written.
    """

    def __init__(self, layer: nn.Module, name: str, norm: torch.Tensor):
        self.layer = weakref.ref(layer)
        self.weight, self.bias = layer.base_layer.weight, layer.base_layer.bias
        magnitude = layer.lora_magnitude_vector[name].weight
        self.adapter = (layer.lora_A[name].weight, layer.lora_B[name].weight, magnitude)
        self.name, self.scaling = name, layer.scaling[name]
        self.scope, self.steps = NORMS.scope, NORMS.watch.steps
        self.mode, self.counts = mode_of(layer), write_counts(self.adapter)
        self.dtype, self.device_type = self.weight.dtype, self.weight.device.type
        self.a, b = (tensor.detach().to(self.dtype) for tensor in self.adapter[:2])
        self.b_transposed = b.T
        self.rank, self.width = self.b_transposed.shape
        self.gain = gain(magnitude, norm)
        self.shift = bias_shift(self.bias, self.gain)

    def fits(self, layer: nn.Module, x: torch.Tensor) -> bool:
        return (
            self.scope == NORMS.scope
            and self.steps == NORMS.watch.steps
            and self.mode == mode_of(layer)
            and layer.scaling.get(self.name) == self.scaling
            and self.counts == write_counts(self.adapter)
            and x.dtype == self.dtype
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(self.device_type)
            and not torch.compiler.is_compiling()
            and self.layer() is layer
        )

    def output(self, x: torch.Tensor) -> torch.Tensor:
        ax = linear(x, self.a)
        y = linear(x, self.weight, self.bias)
        y.view(-1, self.width).addmm_(ax.view(-1, self.rank), self.b_transposed, alpha=self.scaling)
        return y.mul_(self.gain) if self.shift is None else torch.addcmul(self.shift, y, self.gain, out=y)


def planned_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What a layer computes, if there is a plan for it that still fits."""
    plan = NORMS.plans.get(id(layer))
    return plan.output(x) if plan is not None and plan.fits(layer, x) else None


def make_plan(layer: nn.Module, name: str, norm: torch.Tensor) -> RolloutPlan:
    """The plan of a layer for one call, and for the rest of the rollout where there is one."""
    plan = RolloutPlan(layer, name, norm)
    if NORMS.scope:
        NORMS.plans[id(layer)] = plan
    return plan


def drop_plan(layer: nn.Module) -> None:
    """Forget the plan of a layer, after its base layer was exchanged."""
    NORMS.plans.pop(id(layer), None)
