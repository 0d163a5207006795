"""Rollouts with merged adapters, from which the base model comes back as the very objects it was.

With adapters beside its weights, a model decodes more slowly than its base; PEFT's `merge_adapter` and `unmerge_adapter`
change the frozen weights in 16 bits a little every time. Here adapters are merged into copies that stand in the place of
the base parameters for the length of a rollout.
"""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_delta._compat.merging import CopiedMerge, base_parameters
from hf_delta.adapters.base import DeltaLinear
from hf_delta.adapters.dora.merging import KEPT
from hf_delta.adapters.mergeable import kind_of, layers_to_merge, obstacle
from hf_delta.errors import InputError


logger = logging.getLogger(__name__)

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


# -- merging ------------------------------------------------------------------------------------------------------------
def _merge(model: nn.Module) -> tuple[list[CopiedMerge], str | None]:
    """What was merged, or why nothing was."""
    layers = layers_to_merge(model)
    reason = obstacle(model, layers)
    if reason is not None:
        return [], reason
    merges: list[CopiedMerge] = []
    try:
        for path, layer in layers.items():
            merges.append(CopiedMerge(layer, copies=not isinstance(layer, DeltaLinear)))
            reason = _refusal(merges[-1])
            if reason is not None:
                _undo(merges)
                return [], f"{path} ({kind_of(layer)}) {reason}"
        _check_finite(layers)
    except BaseException:
        _undo(merges)
        raise
    return merges, None


def _refusal(merge: CopiedMerge) -> str | None:
    """Merge a layer, or say why PEFT does not."""
    try:
        merge.merge()
    except (InputError, torch.OutOfMemoryError):
        raise
    # Every method refuses in its own way.
    except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        return f"cannot be merged: {error or type(error).__name__}"
    if not merge.layer.merged:
        return "does not merge"
    # Fast DoRA keeps what it found in the place of the weight, which was a copy.
    if (kept := getattr(merge.layer, KEPT, None)) is not None:
        kept.weight = merge.original_weight
    return None


def _undo(merges: list[CopiedMerge]) -> None:
    # Backwards, because layers may share a parameter.
    for merge in reversed(merges):
        merge.undo()


def _check_finite(layers: dict[str, BaseTunerLayer]) -> None:
    found = {}
    for path, layer in layers.items():
        for module, names in base_parameters(layer).items():
            for name in names:
                parameter = getattr(module, name).detach()
                if parameter.numel():
                    # NaN passes through both, and nothing of the size of the weight is allocated.
                    found[f"{path}, {name}"] = torch.isfinite(torch.stack(torch.aminmax(parameter))).all()
    # One transfer for each device.
    answers: dict[str, bool] = {}
    for device in {value.device for value in found.values()}:
        paths = [path for path, value in found.items() if value.device == device]
        answers.update(zip(paths, torch.stack([found[path] for path in paths]).tolist()))
    broken = [path for path in found if not answers[path]]
    if broken:
        raise InputError(
            f"{broken[0]} has NaN or infinite values once its adapter is merged ({len(broken)} tensors in all): training "
            "diverged, or the adapter came from a broken file; go back to an earlier checkpoint."
        )


def _tell(model: nn.Module, message: str) -> None:
    told = _told.setdefault(model, set())
    if message not in told:
        told.add(message)
        logger.warning("%s", message)
