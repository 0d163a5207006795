"""The methods of PEFT's LoRA layers that fast DoRA replaces, their recorded signatures, and how they are exchanged.

Nothing here computes: `hf_delta.adapters.dora` says what stands in the place of each method.
"""

import functools
import itertools
from collections.abc import Callable

import torch
import transformers
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora import bnb, dora, layer, variants
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from hf_delta._compat.peft import require_supported_peft


require_supported_peft()

DoraLinearLayer = dora.DoraLinearLayer

# What is replaced, as `class.method`, and the parameters that it has, as of PEFT 0.21.
SEAMS: dict[str, tuple[str, ...]] = {
    "DoraLinearLayer.forward": (
        "self",
        "x",
        "lora_A",
        "lora_B",
        "scaling",
        "base_layer",
        "base_result",
        "adapter_name",
    ),
    "DoraLinearLayer.update_layer": ("self", "base_layer", "lora_A", "lora_B", "scaling", "place_on_cpu"),
    "DoraLinearLayer.train": ("self", "mode"),
    "Linear.forward": ("self", "x", "args", "kwargs"),
    "Linear.merge": ("self", "safe_merge", "adapter_names"),
    "Linear.unmerge": ("self",),
    "Linear4bit.merge": ("self", "safe_merge", "adapter_names"),
    "Linear4bit.unmerge": ("self",),
    "Linear8bitLt.merge": ("self", "safe_merge", "adapter_names"),
    "Linear8bitLt.unmerge": ("self",),
    "BaseTunerLayer.enable_adapters": ("self", "enabled"),
    "BaseTuner.merge_and_unload": ("self", "progressbar", "safe_merge", "adapter_names"),
    "GenerationMixin.generate": (
        "self",
        "inputs",
        "generation_config",
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "synced_gpus",
        "assistant_model",
        "streamer",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
        "custom_generate",
        "kwargs",
    ),
}

Replacement = Callable[[Callable], Callable]
_originals: dict[str, Callable] = {}
_uncounted = itertools.count(-1, -1)


def classes() -> dict[str, type]:
    """The classes that [`SEAMS`] names and that exist here: those of bitsandbytes need the package."""
    found = {
        "DoraLinearLayer": dora.DoraLinearLayer,
        "Linear": layer.Linear,
        "BaseTuner": BaseTuner,
        "BaseTunerLayer": BaseTunerLayer,
        "GenerationMixin": transformers.GenerationMixin,
    }
    if is_bnb_available():
        found["Linear8bitLt"] = bnb.Linear8bitLt
    if is_bnb_4bit_available():
        found["Linear4bit"] = bnb.Linear4bit
    return found


def installed() -> bool:
    return bool(_originals)


def install(replacements: dict[str, Replacement]) -> None:
    """Replace methods. Each replacement takes the original and gives the function that stands in for it.

    Nothing happens if methods are replaced already.
    """
    if installed():
        return
    found = classes()
    for seam, replacement in replacements.items():
        owner, method = seam.split(".")
        if owner in found:
            original = vars(found[owner])[method]
            setattr(found[owner], method, functools.wraps(original)(replacement(original)))
            _originals[seam] = original


def uninstall() -> None:
    """Put the original functions back."""
    found = classes()
    for seam, original in _originals.items():
        owner, method = seam.split(".")
        setattr(found[owner], method, original)
    _originals.clear()


def is_dora(lora_layer: nn.Module, adapter: str) -> bool:
    """Whether an adapter of a LoRA layer is DoRA over a linear layer, and nothing derived from it."""
    return type(lora_layer.lora_variant.get(adapter)) is variants.DoraLinearVariant


def is_dora_or_lora(lora_layer: nn.Module, adapter: str) -> bool:
    """The same, or LoRA without a variant and without a bias of its own."""
    plain = adapter not in lora_layer.lora_variant and not lora_layer.lora_bias.get(adapter, False)
    return plain or is_dora(lora_layer, adapter)


def mode_of(lora_layer: nn.Module) -> tuple:
    """What of a layer's state says whether, and which, adapters take part in its forward."""
    state = lora_layer.__dict__
    active = state["_active_adapter"]
    # Copies, because the lists are changed in place.
    active = active if isinstance(active, str) else tuple(active)
    return state["training"], state["_disable_adapters"], tuple(state["merged_adapters"]), active


def write_counts(tensors: tuple[torch.Tensor, ...]) -> list[int]:
    """How often autograd saw each tensor being written in place; a number never given again for inference tensors."""
    return [next(_uncounted) if tensor.is_inference() else tensor._version for tensor in tensors]
