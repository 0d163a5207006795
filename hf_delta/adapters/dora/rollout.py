"""Decoding a token takes less time per layer than looking at a layer from all sides: in a rollout that is done once."""

import weakref

import torch
from torch import nn

from hf_delta._compat.torch import write_count
from hf_delta.adapters.dora.cache import NORMS
from hf_delta.adapters.dora.functions import bias_shift, dora_output, gain


class RolloutPlan:
    """All that one LoRA layer computes with during one rollout.

    Good for the rollout in which it was made, while the layer keeps its mode, its active adapter and its scaling, nothing
    is merged or disabled, no optimizer steps and no adapter tensor is written.
    """

    __slots__ = (
        "active",
        "adapter",
        "bias",
        "counts",
        "factors",
        "name",
        "scaling",
        "scope",
        "steps",
        "training",
        "weight",
    )

    def __init__(self, layer: nn.Module, name: str, norm: torch.Tensor):
        base_layer, magnitude = layer.base_layer, layer.lora_magnitude_vector[name].weight
        self.weight, self.bias = base_layer.weight, base_layer.bias
        self.adapter = (layer.lora_A[name].weight, layer.lora_B[name].weight, magnitude)
        self.counts = [write_count(tensor) for tensor in self.adapter]
        self.name, self.scaling, self.active = name, layer.scaling[name], layer.active_adapter
        self.scope, self.steps, self.training = NORMS.scope, NORMS.watch.steps, layer.training
        g, dtype = gain(magnitude, norm), self.weight.dtype
        a, b = (tensor.to(dtype) for tensor in self.adapter[:2])
        self.factors = (a, b, g, bias_shift(self.bias, g), self.scaling)

    def fits(self, layer: nn.Module, x: torch.Tensor) -> bool:
        return (
            self.scope == NORMS.scope
            and not torch.is_grad_enabled()
            and self.steps == NORMS.watch.steps
            and not layer.merged_adapters
            and not layer.disable_adapters
            and layer.active_adapter == self.active
            and layer.training == self.training
            and layer.scaling.get(self.name) == self.scaling
            and x.dtype == self.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and [*map(write_count, self.adapter)] == self.counts
        )

    def output(self, x: torch.Tensor) -> torch.Tensor:
        return dora_output(x, self.weight, self.bias, *self.factors)[0]


class RolloutPlans:
    """The plan of each LoRA layer, while there is a rollout."""

    def __init__(self):
        self._plans: weakref.WeakKeyDictionary[nn.Module, RolloutPlan] = weakref.WeakKeyDictionary()

    def get(self, layer: nn.Module, x: torch.Tensor) -> RolloutPlan | None:
        if not NORMS.scope:
            if self._plans:
                self._plans.clear()
            return None
        plan = self._plans.get(layer)
        return plan if plan is not None and plan.fits(layer, x) else None

    def make(self, layer: nn.Module, name: str, norm: torch.Tensor) -> RolloutPlan:
        plan = RolloutPlan(layer, name, norm)
        if NORMS.scope:
            self._plans[layer] = plan
        return plan

    def drop(self, layer: nn.Module) -> None:
        self._plans.pop(layer, None)


PLANS = RolloutPlans()
