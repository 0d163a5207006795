"""What stands in the place of the forward methods of PEFT's LoRA and DoRA layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_delta._compat.dora import DoraLinearLayer, is_dora
from hf_delta._compat.torch import is_plain_parameter, runs_plainly
from hf_delta.adapters.dora.cache import NORMS
from hf_delta.adapters.dora.functions import FusedDora, compose_change
from hf_delta.adapters.dora.rollout import make_plan, planned_output
from hf_delta.ops.gather import is_sharded


def linear_forward(original: Callable) -> Callable:
    """`Linear.forward`: one fused product where the layer is a plain one with one DoRA adapter, else the original."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Any argument more than `x` asks for something else: a mixed batch, or what a base layer of another kind takes.
        if self.lora_variant and not args and not kwargs:
            output = planned_output(self, x)
            output = fused_output(self, x) if output is None else output
            if output is not None:
                return output
        return original(self, x, *args, **kwargs)

    return forward


def dora_forward(original: Callable) -> Callable:
    """`DoraLinearLayer.forward`: what one adapter adds to the base output, from the factored norm."""

    def forward(
        self,
        x: torch.Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: torch.Tensor | None = None,
        adapter_name: str = "default",
    ) -> torch.Tensor:
        find = NORMS.norm if torch.compiler.is_compiling() else NORMS.known
        norm = find(self, base_layer, lora_A.weight, lora_B.weight, scaling)
        norm = norm if isinstance(norm, torch.Tensor) else norm.norm
        if base_result is None:
            # With dropout, DoRA scales the base output of the input that the adapter sees.
            weight = getattr(base_layer, "weight", None)
            dense = weight is not None and weight.is_floating_point() and not hasattr(base_layer, "compute_dtype")
            base_result = base_layer(x.to(weight.dtype) if dense else x)
        bias = getattr(base_layer, "bias", None)
        base = base_result if bias is None else base_result - bias
        return compose_change(base, lora_B(lora_A(x)), self.weight, norm, scaling)

    return forward


def dora_update_layer(original: Callable) -> Callable:
    """`DoraLinearLayer.update_layer`: the magnitude from the same norm as forward, so that `m / n` starts at exactly 1."""

    def update_layer(
        self,
        *,
        base_layer: nn.Module,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        scaling: float,
        place_on_cpu: bool = False,
    ) -> None:
        original(self, base_layer=base_layer, lora_A=lora_A, lora_B=lora_B, scaling=scaling, place_on_cpu=place_on_cpu)
        NORMS.drop(self)
        weight = getattr(base_layer, "weight", None)
        exact = type(self) is DoraLinearLayer and type(base_layer) is nn.Linear and type(weight) is nn.Parameter
        # A magnitude in 16 bits is rounded whichever way it is computed; a sharded weight has another size here.
        if exact and not is_sharded(weight) and weight.dtype == self.weight.dtype == lora_A.dtype == torch.float32:
            if {weight.device, lora_A.device, self.weight.device} == {torch.device("cpu")} or weight.is_cuda:
                norm = NORMS.norm(self, base_layer, lora_A, lora_B, scaling)
                self.weight = nn.Parameter(norm.masked_fill(norm.isinf(), 0))

    return update_layer


def dora_train(original: Callable) -> Callable:
    """`DoraLinearLayer.train`: between training and evaluation weights may be written in ways that leave no trace."""

    def train(self, mode: bool = True) -> nn.Module:
        if mode != self.training:
            NORMS.drop(self)
        return original(self, mode)

    return train


def generate(original: Callable) -> Callable:
    """`generate`: one norm per layer for all tokens."""

    def generate_with_kept_norms(self, *args: Any, **kwargs: Any) -> Any:
        with NORMS.rollout():
            return original(self, *args, **kwargs)

    return generate_with_kept_norms


def fused_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The output of a LoRA layer in one go; None where that would not be what the layer's modules compute one by one."""
    if layer.merged_adapters or layer.disable_adapters or torch.compiler.is_compiling():
        return None
    active = layer.active_adapters
    names = active if len(active) == 1 else [name for name in active if name in layer.lora_A]
    if len(names) != 1 or not is_dora(layer, names[0]):
        return None
    name = names[0]
    if layer.training and type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    base_layer, lora_a, lora_b = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    if not (_is_plain(base_layer) and _is_plain(lora_a) and _is_plain(lora_b)):
        return None
    dora = layer.lora_magnitude_vector[name]
    weight, bias, a, b, magnitude = base_layer.weight, base_layer.bias, lora_a.weight, lora_b.weight, dora.weight
    if not _takes_plain_tensors(x, weight, bias, a, b, magnitude):
        return None
    scaling = layer.scaling[name]
    known = NORMS.known(dora, base_layer, a, b, scaling)
    if torch.is_grad_enabled():
        some_zero = NORMS.some_zero(known, magnitude)
        return FusedDora.apply(x, weight, bias, a, b, magnitude, known.norm, scaling, some_zero)
    return make_plan(layer, name, known.norm).output(x)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and runs_plainly(module)


def _takes_plain_tensors(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *adapter: torch.Tensor
) -> bool:
    return (
        x.dtype == weight.dtype
        and is_plain_parameter(weight)
        and not weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and all(is_plain_parameter(tensor) and tensor.device == weight.device for tensor in adapter)
        and not torch.is_autocast_enabled(x.device.type)
    )
