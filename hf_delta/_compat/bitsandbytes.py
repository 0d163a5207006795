"""Private names of bitsandbytes: the layout into which its 4-bit layers rearrange their weights on some processors."""

import copy
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend
from torch import nn


_BACKENDS = (Bnb4bitBackend, Bnb8bitBackend)


def dequantised_weight(layer: nn.Module, backend: Any = None) -> torch.Tensor:
    """The weight of a linear layer, `(o, i)` for quantised ones, as a dense tensor; one that is dense is given as it is.

    `backend` is PEFT's for this layer, where it has been found already. PEFT's `dequantize_module_weight` is not used,
    because it gives the layer another parameter object, and 8-bit layers lose their scales with it.

    On processors with AVX512-BF16, a 4-bit layer packs its weight anew in its first forward without gradients, and rounds
    its scales to bfloat16. What bitsandbytes and PEFT dequantise after that is not the weight any more.
    """
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        # Only putting a weight back, which is not done here, needs torchao's function.
        backend = backend or resolve_quantization_backend(layer, get_apply_tensor_subclass=object)
        return layer.weight if backend is None else backend.get_base_weight(layer)
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    unpacked = copy.copy(state)
    # The inverse would quantise the scales once more, or leave them in the order of the packed weight.
    unpacked.original_nested = False
    data, unpacked = _convert_weight_packed_for_cpu_inverse(layer.weight.data, unpacked)
    unpacked.absmax = state.absmax.T.reshape(-1).float()
    return dequantize_4bit(data, unpacked)


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether a layer holds its weight in a format of bitsandbytes, 4 or 8 bits."""
    return isinstance(resolve_quantization_backend(layer, get_apply_tensor_subclass=object), _BACKENDS)


def declare_dense(model: nn.Module) -> None:
    """Bring the configuration of a quantised model up to date after some of its layers were replaced by dense ones.

    Saved as it was, the model would be loaded with its dense weights put into quantised layers.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    settings = getattr(quantizer, "quantization_config", None)
    if not hasattr(settings, "llm_int8_skip_modules"):
        return
    modules = dict(model.named_modules())
    dense = [name for name, module in modules.items() if type(module) is nn.Linear]
    if any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in modules.values()):
        settings.llm_int8_skip_modules = dense
        model.config.quantization_config = settings
    else:
        quantizer.remove_quantization_config(model)
        model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
