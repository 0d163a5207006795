"""Whether the adapters of a model can be merged beside its base parameters, and why not."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_delta._compat.bitsandbytes import is_bitsandbytes
from hf_delta._compat.merging import base_parameters, is_flattened
from hf_delta.adapters.base import DeltaLinear
from hf_delta.ops.gather import is_partitioned, is_sharded


SHARDED = (FullyShardedDataParallel, FSDPModule)
DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layers_to_merge(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The adapted layers, by path, that compute with an active adapter beside their weight."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and not layer.merged and not layer.disable_adapters and _names(layer)
    }


def _names(layer: BaseTunerLayer) -> list[str]:
    """The active adapters that this layer has."""
    containers = [getattr(layer, name, ()) for name in layer.adapter_layer_names]
    return [name for name in layer.active_adapters if any(name in container for container in containers)]


def obstacle(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> str | None:
    """Why these layers cannot all be merged into copies; what only `merge` itself finds out is not known here."""
    for module in model.modules():
        if isinstance(module, SHARDED):
            return "the model is sharded by FSDP"
        if isinstance(module, PeftModel) and (reason := _obstacle_of_method(module)):
            return reason
    for path, layer in layers.items():
        reason = _obstacle_of_weights(layer) or _obstacle_of_adapters(layer)
        if reason is not None:
            return f"{path} {reason}"
    return None


def _obstacle_of_method(model: PeftModel) -> str | None:
    config = model.active_peft_config
    method = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or method == "ADAPTION_PROMPT":
        return f"{method} is no change of weights"
    return "XLORA weights its adapters anew for every token" if method == "XLORA" else None


def _obstacle_of_weights(layer: BaseTunerLayer) -> str | None:
    if any(isinstance(p, DTensor) or is_partitioned(p) or is_flattened(p) for p in layer.parameters()):
        return "is sharded"
    below = base_parameters(layer)
    if not any(below.values()):
        return f"has a base layer without parameters ({type(layer.get_base_layer()).__name__}), as quantised ones are"
    for module, names in below.items():
        if isinstance(module, BaseTunerLayer):
            return f"has adapters of several methods, or inside of one another ({kind_of(layer)}, {kind_of(module)})"
        for name in names:
            parameter = getattr(module, name)
            if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
                return f"has a {name} that is no plain tensor ({type(parameter).__name__}), as quantised ones are"
            if parameter.dtype not in DENSE:
                return f"has a quantised {name} ({parameter.dtype})"
            if parameter.is_meta:
                return f"has a {name} that is offloaded"
    return None


def _obstacle_of_adapters(layer: BaseTunerLayer) -> str | None:
    names = _names(layer)
    stacked = layer.base_layer
    while isinstance(stacked, BaseTunerLayer):
        if not hasattr(stacked, "parameter_name"):
            return f"has adapters of several methods ({kind_of(layer)}, {kind_of(stacked)})"
        stacked = stacked.base_layer
    if len(names) > 1 and not _adds_up(layer, names):
        return f"has {len(names)} active adapters ({kind_of(layer)}), which need not be the same merged in turn"
    return None


def _adds_up(layer: BaseTunerLayer, names: list[str]) -> bool:
    if isinstance(layer, DeltaLinear):
        return True
    return isinstance(layer, LoraLayer) and not any(name in layer.lora_variant for name in names)


def obstacle_to_streaming(model: nn.Module, layers: dict[str, BaseTunerLayer]) -> str | None:
    """Why these layers cannot all be merged out of place, one by one; sharded and bitsandbytes' weights can."""
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
            return (
                "the model is sharded by FSDP 1; version 2 of FSDP, and DeepSpeed, shard in a way that can be gathered"
            )
        if isinstance(module, PeftModel) and (reason := _obstacle_of_method(module)):
            return reason
        if reason := _obstacle_of_quantizer(module):
            return reason
    for path, layer in layers.items():
        reason = _obstacle_of_any_weights(layer) or _obstacle_of_adapters(layer)
        if reason is not None:
            return f"{path} {reason}"
    return None


def _obstacle_of_quantizer(module: nn.Module) -> str | None:
    quantizer = getattr(module, "hf_quantizer", None)
    if quantizer is None:
        return None
    method = getattr(quantizer.quantization_config, "quant_method", "")
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        return f"the model is quantised with {method}; train on the dense model, in 4 bits if need be (load_in_4bit)"
    if quantizer.pre_quantized:
        return "the model is stored quantised, and so vLLM would load it; name the dense model, and load_in_4bit: true"
    return None


def _obstacle_of_any_weights(layer: BaseTunerLayer) -> str | None:
    base = layer.get_base_layer()
    if any(is_flattened(parameter) for parameter in layer.parameters()):
        return "is sharded by FSDP 1; version 2 of FSDP, and DeepSpeed, shard in a way that can be gathered"
    quantised = is_bitsandbytes(base)
    if quantised and any(is_sharded(parameter) for parameter in base.parameters()):
        return "is quantised and sharded, from which its weight cannot be told"
    for module, names in base_parameters(layer).items():
        if isinstance(module, BaseTunerLayer):
            return f"has adapters of several methods, or inside of one another ({kind_of(layer)}, {kind_of(module)})"
        for name in names:
            parameter = getattr(module, name)
            if parameter.is_meta:
                return f"has a {name} that is offloaded"
            if parameter.dtype not in DENSE and not quantised:
                return f"has a {name} in a format that is not read here ({parameter.dtype})"
    if not any(True for _ in base.parameters()):
        return f"has a base layer without parameters ({type(base).__name__}), as GPTQ's and AWQ's are"
    return None


def kind_of(layer: nn.Module) -> str:
    """Method and class, for messages."""
    return f"{type(layer).__module__.removeprefix('peft.tuners.').split('.')[0]} {type(layer).__name__}"
