"""What one adapted layer adds to its weight: dense, or as exact low-rank factors."""

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.miss import MissLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_delta.adapters.base import DeltaLinear
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_tensor, whole_parameters


Factors = tuple[torch.Tensor, torch.Tensor]


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, BaseTunerLayer]:
    """The layers that have this adapter, by their names in the base model.

    Raises:
        `InputError`: there are none.
    """
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = {n: m for n, m in root.named_modules() if isinstance(m, BaseTunerLayer) and _has(m, adapter)}
    if not layers:
        raise InputError(f"the model has no layer with an adapter {adapter!r}.")
    return layers


def exact_factors(layer: BaseTunerLayer, adapter: str) -> Factors | None:
    """`B (o, k)` and `A (k, i)` in float32 with `B @ A` exactly what the layer adds; None if it is not of that form."""
    if isinstance(layer, DeltaLinear):
        with whole_parameters(*layer.adapter_modules):
            layer.check_adapter(adapter)
            factors = layer.lora_factors(adapter)
        return None if factors is None else (factors[1].float(), factors[0].float())
    # AdaLoRA's layers are a kind of LoRA's with tensors of another meaning.
    if isinstance(layer, LoraLayer) and isinstance(layer.lora_A, nn.ModuleDict):
        return None if adapter in layer.lora_variant else _lora_factors(layer, adapter)
    if isinstance(layer, MissLayer) and layer.miss_fn != "bat":
        return _miss_factors(layer, adapter)
    return None


def dora_factors(layer: BaseTunerLayer, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`B`, `A` and the magnitude `(o,)` with which DoRA gives exactly this layer; None if it is not of that form."""
    if isinstance(layer, DeltaLinear):
        if not hasattr(layer, "dora_factors") or exact_factors(layer, adapter) is not None:
            return None
        with whole_parameters(*layer.adapter_modules):
            a, b, magnitude = layer.dora_factors(adapter)
        return b.float(), a.float(), magnitude.float()
    if (
        isinstance(layer, LoraLayer)
        and layer.use_dora.get(adapter)
        and not isinstance(layer.get_base_layer(), nn.Embedding)
    ):
        magnitude = full_tensor(layer.lora_magnitude_vector[adapter].weight).float()
        return *_lora_factors(layer, adapter), magnitude.reshape(-1)
    return None


def weight_change(layer: BaseTunerLayer, adapter: str) -> torch.Tensor:
    """What the layer adds to its weight `(o, i)`, in float32; for an embedding `(d, vocabulary)`."""
    if isinstance(layer, DeltaLinear):
        with torch.no_grad(), whole_parameters(*layer.adapter_modules):
            layer.check_adapter(adapter)
            return layer.delta_weight(adapter, layer.original_weight()).float()
    base = layer.get_base_layer()
    change = merged_parameters(layer, adapter)["weight"] - full_tensor(base.weight).float()
    return change.T if isinstance(base, (Conv1D, nn.Embedding)) else change


def merged_parameters(layer: BaseTunerLayer, adapter: str) -> dict[str, torch.Tensor]:
    """The parameters of the base layer with the adapter in them, in its own layout and float32; it is left alone.

    Raises:
        `InputError`: the layer has merged adapters, or its method or its kind of layer cannot be merged so.
    """
    base = layer.get_base_layer()
    if layer.merged:
        raise InputError("adapters are merged into the model: call unmerge_adapter first.")
    if isinstance(layer, DeltaLinear):
        merged = full_tensor(layer.original_weight()).float() + weight_change(layer, adapter)
        others = {n: full_tensor(p).float() for n, p in base.named_parameters() if n != "weight"}
        return {"weight": merged.T if isinstance(base, Conv1D) else merged, **others}
    if resolve_quantization_backend(base) is not None:
        raise InputError(
            f"the change of a quantised {type(base).__name__} by {type(layer).__name__} is computed from the saved adapter: "
            "save it, and run hf-delta export with --load-in-4bit or --load-in-8bit."
        )
    kept = dict(base.named_parameters(recurse=False))
    try:
        for name, parameter in kept.items():
            setattr(base, name, nn.Parameter(full_tensor(parameter).to(torch.float32, copy=True), requires_grad=False))
        layer.merge(adapter_names=[adapter])
        return {name: parameter.detach() for name, parameter in base.named_parameters(recurse=False)}
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise InputError(f"{type(layer).__name__} cannot be merged: {error}") from error
    finally:
        for name, parameter in kept.items():
            setattr(base, name, parameter)
        layer.merged_adapters.clear()


def _has(layer: BaseTunerLayer, adapter: str) -> bool:
    return any(adapter in getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name))


def _lora_factors(layer: LoraLayer, adapter: str) -> Factors:
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if a.ndim != 2:
        raise InputError(f"a {type(layer.get_base_layer()).__name__} is no linear layer; use the format merged.")
    return full_tensor(b).float() * layer.scaling[adapter], full_tensor(a).float()


def _miss_factors(layer: MissLayer, adapter: str) -> Factors:
    """MiSS adds up the inputs `j` with equal `j mod r`, and multiplies the sums with its block."""
    block = full_tensor(layer.miss_block[adapter]).float()
    size = block.shape[0]
    sums = torch.zeros(size, layer.in_features, device=block.device)
    columns = torch.arange(layer.in_features, device=block.device)
    sums[columns % size, columns] = 1.0
    return block.T.repeat(layer.out_features // block.shape[1], 1), sums
