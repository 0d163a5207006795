"""Rollouts with merged adapters, from which the base model comes back as the very objects it was.

With adapters beside its weights, a model decodes more slowly than its base; PEFT's `merge_adapter` and `unmerge_adapter`
change the frozen weights in 16 bits a little every time. Here adapters are merged into copies that stand in the place of
the base parameters for the length of a rollout.
"""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_delta._compat.dora import installed as fast_dora_is_on
from hf_delta._compat.dora import is_dora, is_dora_or_lora
from hf_delta._compat.merging import CopiedMerge, base_parameters, is_flattened
from hf_delta.adapters.base import DeltaLinear
from hf_delta.adapters.dora.merging import KEPT
from hf_delta.errors import InputError


logger = logging.getLogger(__name__)

DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


@contextmanager
def merged_rollouts(model: nn.Module) -> Iterator[None]:
    """
    Context in which the active adapters are merged, and after which the base is what it was, object by object.

    Inside, every adapted layer has a copy of its base parameters with the adapters in it, `W' = W + ΔW` in the dtype of
    `W`, and computes with that alone; the extra memory is one copy of the adapted weights. Gradients, optimizer steps and
    changes of adapters inside are not for this context. Layers that are merged or disabled already are left as they are.

    Where that cannot be done (quantised or sharded weights, weights that are offloaded, methods that do not merge,
    prompts that are learnt), the model computes as ever, and one warning for each model says why.

    Args:
        model: a PEFT model, or one that contains PEFT layers; others have nothing to merge.

    Raises:
        `InputError`: a merged weight would be NaN or infinite; nothing is changed.
    """
    merges, reason = _merge(model)
    if reason is not None:
        _tell(model, f"Rollouts go through unmerged adapters: {reason}.")
    try:
        yield
    finally:
        _undo(merges)


@contextmanager
def base_weights_kept(model: nn.Module) -> Iterator[None]:
    """
    Context in which `model.merge_adapter()` merges into copies, and `model.unmerge_adapter()` puts the originals back.

    For code that calls these two by itself, such as TRL's transfer of weights to vLLM. What is merged at the end of the
    context is unmerged there. Where it cannot be done, PEFT merges as ever, and one warning for each model says why.

    Raises:
        `InputError`: a merged weight would be NaN or infinite; or, from `merge_adapter()`, weights are sharded and PEFT's
            merge of this method does not reach them, so that the base model would be taken for the merged one.
    """
    tuners = [module for module in model.modules() if isinstance(module, BaseTuner)]
    merging = [_Merging(tuner) for tuner in tuners]
    try:
        for each in merging:
            each.start()
        yield
    finally:
        for each in merging:
            each.stop()


class _Merging:
    """What stands in the place of `merge_adapter` and `unmerge_adapter` of one tuner."""

    def __init__(self, tuner: BaseTuner):
        self.tuner = tuner
        self.merges: list[CopiedMerge] = []

    def start(self) -> None:
        originals = self.tuner.merge_adapter, self.tuner.unmerge_adapter
        # On the object: PeftModel passes both names on to its tuner.
        self.tuner.merge_adapter = partial(self._merge, originals[0])
        self.tuner.unmerge_adapter = partial(self._unmerge, originals[1])

    def stop(self) -> None:
        self._restore()
        del self.tuner.merge_adapter, self.tuner.unmerge_adapter

    def _restore(self) -> None:
        merges, self.merges = self.merges, []
        _undo(merges)

    def _merge(self, original, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        if self.merges:
            return
        self.merges, reason = _merge(self.tuner, adapter_names)
        if reason is not None:
            _check_shards(self.tuner, adapter_names)
            _tell(self.tuner, f"PEFT merges and unmerges in place, which changes the base weights a little: {reason}.")
            original(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unmerge(self, original) -> None:
        if self.merges:
            self._restore()
        else:
            original()


# -- merging ------------------------------------------------------------------------------------------------------------
def _merge(model: nn.Module, adapter_names: list[str] | None = None) -> tuple[list[CopiedMerge], str | None]:
    """What was merged, or why nothing was."""
    layers = _layers_to_merge(model, adapter_names)
    reason = _obstacle(model, layers, adapter_names)
    if reason is not None:
        return [], reason
    merges = []
    try:
        for path, layer in layers.items():
            merges.append(CopiedMerge(layer, copies=not isinstance(layer, DeltaLinear)))
            try:
                merges[-1].merge(adapter_names)
            except (NotImplementedError, AttributeError, TypeError) as error:
                reason = f"{path} ({_kind(layer)}) cannot be merged: {error or type(error).__name__}"
            except (ValueError, RuntimeError) as error:
                if isinstance(error, (InputError, torch.OutOfMemoryError)):
                    raise
                reason = f"{path} ({_kind(layer)}) cannot be merged: {error}"
            if reason is None and not layer.merged:
                reason = f"{path} ({_kind(layer)}) does not merge"
            if reason is not None:
                _undo(merges)
                return [], reason
            _keep_one_copy(merges[-1])
        _check_finite(layers)
    except BaseException:
        _undo(merges)
        raise
    return merges, None


def _undo(merges: list[CopiedMerge]) -> None:
    # Backwards, because layers may share a parameter.
    for merge in reversed(merges):
        merge.undo()


def _keep_one_copy(merge: CopiedMerge) -> None:
    # Fast DoRA keeps what it found in the place of the weight, which was a copy.
    if (kept := getattr(merge.layer, KEPT, None)) is not None:
        kept.weight = merge.original_weight


def _check_finite(layers: dict[str, BaseTunerLayer]) -> None:
    paths, extremes = [], []
    for path, layer in layers.items():
        for module, names in base_parameters(layer).items():
            for name in names:
                parameter = getattr(module, name)
                if parameter.numel():
                    paths.append(f"{path}, {name}")
                    # Without a mask of the size of the weight; NaN passes through both.
                    extremes.append(torch.stack(torch.aminmax(parameter.detach())).float().cpu())
    broken = [path for path, extreme in zip(paths, extremes) if not torch.isfinite(extreme).all()]
    if broken:
        raise InputError(
            f"{broken[0]} has NaN or infinite values once its adapter is merged ({len(broken)} tensors in all): training "
            "diverged, or the adapter came from a broken file; go back to an earlier checkpoint."
        )


# -- what is merged, and what cannot be -----------------------------------------------------------------------------------
def _layers_to_merge(model: nn.Module, adapter_names: list[str] | None) -> dict[str, BaseTunerLayer]:
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


def _obstacle(model: nn.Module, layers: dict[str, BaseTunerLayer], adapter_names: list[str] | None) -> str | None:
    for module in model.modules():
        if isinstance(module, FullyShardedDataParallel):
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
    if config.is_prompt_learning:
        return f"{method} is no change of weights"
    if method == "XLORA":
        return "XLORA weights its adapters anew for every token"
    if method == "ADAPTION_PROMPT":
        return f"{method} is no change of weights"
    return None


def _obstacle_of_weights(layer: BaseTunerLayer) -> str | None:
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") or is_flattened(p) for p in layer.parameters()):
        return "is sharded"
    below = base_parameters(layer)
    if not any(below.values()):
        return f"has a base layer without parameters ({type(layer.get_base_layer()).__name__}), as quantised ones are"
    for module, names in below.items():
        if isinstance(module, BaseTunerLayer):
            return f"has adapters of several methods, or inside of one another ({_kind(layer)}, {_kind(module)})"
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
            return f"has adapters of several methods ({_kind(layer)}, {_kind(stacked)})"
        stacked = stacked.base_layer
    if len(names) > 1 and not _adds_up(layer, names):
        return f"has {len(names)} active adapters ({_kind(layer)}) and merged in turn they need not be what they are together"
    return None


def _adds_up(layer: BaseTunerLayer, names: list[str]) -> bool:
    if isinstance(layer, DeltaLinear):
        return True
    return isinstance(layer, LoraLayer) and not any(name in layer.lora_variant for name in names)


def _check_shards(tuner: BaseTuner, adapter_names: list[str] | None) -> None:
    # Assignment to `.data`, which most of PEFT's merges end in, is ignored on a sharded parameter.
    for path, layer in _layers_to_merge(tuner, adapter_names).items():
        sharded = any(isinstance(p, DTensor) for names in [base_parameters(layer)] for p in _tensors(names))
        if sharded and not _reaches_shards(layer, _names(layer, adapter_names)):
            raise InputError(
                f"{path} is sharded by FSDP2, and PEFT's merge of {_kind(layer)} does not reach sharded weights: the base "
                "model would be sent instead of the merged one. Use DDP or DeepSpeed, or LoRA without a variant."
            )


def _reaches_shards(layer: BaseTunerLayer, names: list[str]) -> bool:
    if isinstance(layer, DeltaLinear):
        return True
    if not isinstance(layer, LoraLayer):
        return False
    plain = not any(name in layer.lora_variant for name in names)
    exact = fast_dora_is_on() and any(is_dora(layer, name) for name in names)
    return plain or (exact and all(is_dora_or_lora(layer, name) for name in names))


def _tensors(parameters: dict[nn.Module, list[str]]) -> list[torch.Tensor]:
    return [getattr(module, name) for module, names in parameters.items() for name in names]


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__module__.removeprefix('peft.tuners.').split('.')[0]} {type(layer).__name__}"


def _tell(model: nn.Module, message: str) -> None:
    told = _told.setdefault(model, set())
    if message not in told:
        told.add(message)
        logger.warning("%s", message)
