"""Whether the adapters of a model can be merged into copies of its base parameters, and why not."""

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_delta._compat.dora import installed as fast_dora_is_on
from hf_delta._compat.dora import is_dora, is_dora_or_lora
from hf_delta._compat.merging import base_parameters, is_flattened
from hf_delta.adapters.base import DeltaLinear
from hf_delta.errors import InputError


SHARDED = (FullyShardedDataParallel, FSDPModule)
DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layers_to_merge(model: nn.Module, adapter_names: list[str] | None) -> dict[str, BaseTunerLayer]:
    """The adapted layers, by path, that compute with one of these adapters, or an active one, beside their weight."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer)
        and not layer.merged
        and not layer.disable_adapters
        and _names(layer, adapter_names)
    }


def _names(layer: BaseTunerLayer, adapter_names: list[str] | None) -> list[str]:
    """The adapters out of these, or of the active ones, that this layer has."""
    containers = [getattr(layer, name, ()) for name in layer.adapter_layer_names]
    wanted = layer.active_adapters if adapter_names is None else adapter_names
    return [name for name in wanted if any(name in container for container in containers)]


def obstacle(model: nn.Module, layers: dict[str, BaseTunerLayer], adapter_names: list[str] | None) -> str | None:
    """Why these layers cannot all be merged into copies; what only `merge` itself finds out is not known here."""
    for module in model.modules():
        if isinstance(module, SHARDED):
            return "the model is sharded by FSDP"
        if isinstance(module, PeftModel) and (reason := _obstacle_of_method(module)):
            return reason
    for path, layer in layers.items():
        reason = _obstacle_of_weights(layer) or _obstacle_of_adapters(layer, adapter_names)
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
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") or is_flattened(p) for p in layer.parameters()):
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


def _obstacle_of_adapters(layer: BaseTunerLayer, adapter_names: list[str] | None) -> str | None:
    names = _names(layer, adapter_names)
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


def check_shards(tuner: BaseTuner, adapter_names: list[str] | None) -> None:
    """
    Raises:
        `InputError`: weights are sharded by FSDP2, and PEFT's merge of the method would not reach them. Most of PEFT's
            merges end in an assignment to `.data`, which is ignored on a sharded parameter.
    """
    split = any(isinstance(module, FSDPModule) for module in tuner.modules())
    for path, layer in layers_to_merge(tuner, adapter_names).items():
        sharded = split or any(isinstance(parameter, DTensor) for parameter in layer.get_base_layer().parameters())
        if sharded and not _reaches_shards(layer, _names(layer, adapter_names)):
            raise InputError(
                f"{path} is sharded by FSDP2, and PEFT's merge of {kind_of(layer)} does not reach sharded weights: the base "
                "model would be taken for the merged one. Use DDP or DeepSpeed, LoRA without a variant, or an adapter of "
                "hf_delta."
            )


def _reaches_shards(layer: BaseTunerLayer, names: list[str]) -> bool:
    if isinstance(layer, DeltaLinear):
        return True
    if not isinstance(layer, LoraLayer):
        return False
    plain = not any(name in layer.lora_variant for name in names)
    exact = fast_dora_is_on() and any(is_dora(layer, name) for name in names)
    return plain or (exact and all(is_dora_or_lora(layer, name) for name in names))


def kind_of(layer: nn.Module) -> str:
    """Method and class, for messages."""
    return f"{type(layer).__module__.removeprefix('peft.tuners.').split('.')[0]} {type(layer).__name__}"
