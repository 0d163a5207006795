"""Merging of LoRA layers that have a DoRA adapter: the base weight is exchanged and kept, and comes back bit for bit."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import nn

from hf_delta._compat.bitsandbytes import declare_dense
from hf_delta._compat.dora import is_dora, is_dora_or_lora
from hf_delta.adapters.base.merging import MergedWeight
from hf_delta.adapters.dora.cache import NORMS
from hf_delta.adapters.dora.functions import gain, usable_norm
from hf_delta.adapters.dora.rollout import drop_plan
from hf_delta.ops.gather import full_tensor, into_shards
from hf_delta.ops.norms import factored_row_norms, row_square_norms, times_transposed, widened


# Layers whose original weight is kept, under this attribute.
KEPT = "hfd_dora_kept_weight"
_merged_layers: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def merge(original: Callable) -> Callable:
    """`merge` of a LoRA layer. Adapters apply one after another, as PEFT's do, each norm being that of the original weight."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [name for name in (adapter_names or self.active_adapters) if name in self.lora_A]
        if not _takes_part(self, names):
            return original(self, safe_merge=safe_merge, adapter_names=adapter_names)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if names:
            _merge(self, names, safe_merge)

    return merge


def unmerge(original: Callable) -> Callable:
    """`unmerge` of a LoRA layer."""

    def unmerge(self) -> None:
        kept = getattr(self, KEPT, None)
        if kept is None:
            return original(self)
        _into_shards(self)
        kept.restore(self)
        delattr(self, KEPT)
        self.merged_adapters.clear()
        _merged_layers.discard(self)
        _drop_norms(self)

    return unmerge


def enable_adapters(original: Callable) -> Callable:
    """`enable_adapters` of any layer: what [`merge`] has merged is taken out before a forward, as sharded weights need it."""

    def enable_adapters(self, enabled: bool) -> None:
        if any(is_dora(self, name) for name in getattr(self, "lora_variant", ())):
            _into_shards(self)
        if not enabled and hasattr(self, KEPT):
            self.unmerge()
        original(self, enabled)

    return enable_adapters


def merge_and_unload(original: Callable) -> Callable:
    """`merge_and_unload` of a model: where quantised layers became dense, its configuration says so."""

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        layers = [module for module in self.model.modules() if getattr(module, "lora_variant", None)]
        becomes_dense = any(is_dora(layer, name) for layer in layers for name in layer.lora_variant)
        model = original(self, *args, **kwargs)
        if becomes_dense:
            declare_dense(model)
        return model

    return merge_and_unload


def any_merged() -> bool:
    """Whether a living layer has a base weight exchanged by [`merge`]."""
    if _merged_layers:
        # Models that are gone may wait in reference cycles.
        gc.collect()
    return len(_merged_layers) > 0


def _takes_part(layer: nn.Module, names: list[str]) -> bool:
    everything = [*layer.merged_adapters, *names]
    by_peft = layer.merged_adapters and not hasattr(layer, KEPT)
    return (
        any(is_dora(layer, name) for name in layer.lora_variant)
        and all(is_dora_or_lora(layer, name) for name in everything)
        and not by_peft
    )


def _into_shards(layer: nn.Module) -> None:
    # A quantised layer rearranges its weight when its state is asked for.
    base = [] if resolve_quantization_backend(layer.get_base_layer()) else [layer.get_base_layer()]
    into_shards(*base, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)


def _merge(layer: nn.Module, names: list[str], safe_merge: bool) -> None:
    _into_shards(layer)
    kept = getattr(layer, KEPT, None)
    if kept is None:
        layer.quantization_backend = resolve_quantization_backend(layer.get_base_layer())
        kept = MergedWeight(layer.get_base_layer())
    transposed = layer.fan_in_fan_out
    weight = kept.original(layer.quantization_backend)
    merged = merged_weight(layer, [*layer.merged_adapters, *names], weight.T if transposed else weight)
    if safe_merge and not torch.isfinite(merged).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken; nothing was merged."
        )
    merged = merged.to(weight.dtype)
    kept.install(layer, merged.T.contiguous() if transposed else merged)
    setattr(layer, KEPT, kept)
    layer.merged_adapters.extend(names)
    _merged_layers.add(layer)
    _drop_norms(layer)


@torch.no_grad()
def merged_weight(layer: nn.Module, names: list[str], weight: torch.Tensor) -> torch.Tensor:
    """The weight `(o, i)` with adapters in it one after another, in float32 or wider.

    `W <- W + s B A` for LoRA, `W <- m / n (W + s B A)` for DoRA with `n` of the weight without other adapters.
    """
    merged = weight.to(widened(weight.dtype), copy=True)
    squares = row_square_norms(weight)
    for name in names:
        a, b = (full_tensor(factors[name].weight) for factors in (layer.lora_A, layer.lora_B))
        a, b = a.to(merged.device, merged.dtype), b.to(merged.device, merged.dtype)
        scaling = layer.scaling[name]
        merged.addmm_(b, a, alpha=scaling)
        if is_dora(layer, name):
            norm = usable_norm(factored_row_norms(squares, times_transposed(weight, a), a, b, scaling))
            magnitude = full_tensor(layer.lora_magnitude_vector[name].weight).to(merged.device)
            merged.mul_(gain(magnitude, norm).unsqueeze(1))
    return merged


def _drop_norms(layer: nn.Module) -> None:
    drop_plan(layer)
    for dora in layer.lora_magnitude_vector.values():
        NORMS.drop(dora)
