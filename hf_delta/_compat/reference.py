"""The reference adapter of TRL's trainers, copied by structure instead of by name.

Given a model with a trained adapter, TRL 1.16 adds an adapter "ref" and copies to it the parameters that have `.default.`
in their names. PEFT keeps many adapters in dictionaries of parameters, whose names end in `.default`: nothing of them is
copied, "ref" stays at its initialisation, and the policy is held to the base model without a word. Buffers and tables
of indices are left out too. [`ReferenceRepair`] copies all of it, and [`base_kept`] keeps the new adapter from changing
the policy.

And a reference that is a model of its own is loaded whole, see [`only_policy_is_emptied`].
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer

from hf_delta._compat.peft import BufferDict
from hf_delta._compat.transformers import EMPTYING
from hf_delta.errors import InputError


POLICY, REFERENCE = "default", "ref"

# Where PEFT keeps what belongs to one adapter: in attributes of these modules, of these types, under the adapter's name.
_OWNERS = (PeftModel, BaseTuner, BaseTunerLayer, AuxiliaryTrainingWrapper)
_CONTAINERS = (nn.ModuleDict, nn.ParameterDict, BufferDict, dict)

# Values of LoRA's `init_lora_weights` that take the start of a new adapter out of the base weights.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class ReferenceRepair(Trainer):
    """
    Makes the adapter "ref" of TRL's trainers equal to "default", whatever the adapter keeps and however it is named.

    Stands behind TRL's trainer among the bases, `class Hooks(DPOTrainer, ReferenceRepair)`, so that its constructor
    runs when TRL's has made its copy and nothing has used it: before the model is hashed and moved, and before
    reference log-probabilities are computed in advance. Without such a copy it does nothing.

    Raises:
        `InputError`: the adapter cannot be copied.
    """

    def __init__(self, model=None, *args, **kwargs):
        if has_reference(model):
            copy_adapter(model, POLICY, REFERENCE)
        super().__init__(model, *args, **kwargs)
        # The policy is loaded by now, and the reference is not.
        self.emptying = os.environ.pop(EMPTYING, None)


@contextmanager
def only_policy_is_emptied(trainer: ReferenceRepair) -> Iterator[None]:
    """
    While TRL's constructor runs: every process loads the whole reference, with `fsdp_cpu_ram_efficient_loading` too.

    With it, transformers up to version 5.17 at least gives weights to the first process alone. Accelerate sends those of the
    policy to the others, and nobody sends those of the reference: TRL 1.16 shards what each process has, which is zeros.
    """
    trainer.emptying = None
    try:
        yield
    finally:
        if trainer.emptying is not None:
            os.environ[EMPTYING] = trainer.emptying


@contextmanager
def base_kept(model) -> Iterator[None]:
    """
    While TRL adds the reference adapter: begin it in the plain way where the configuration's own would change the base.

    The base weights of a trained PiSSA adapter are a residual. A second adapter of that configuration takes its own
    start out of them again, and the policy is no longer the one that was trained.
    """
    config = model.peft_config.get(POLICY) if isinstance(model, PeftModel) else None
    start = getattr(config, "init_lora_weights", None)
    if not (isinstance(start, str) and start.lower().startswith(_BASE_CHANGING)):
        yield
        return
    config.init_lora_weights = True
    try:
        yield
    finally:
        config.init_lora_weights = start


def has_reference(model) -> bool:
    """Whether TRL has made "ref" from "default"; an adapter of the user's own with that name is none of our business."""
    if not isinstance(model, PeftModel):
        return False
    config = model.peft_config.get(REFERENCE)
    # TRL adds it with the very configuration of the policy; a loaded adapter has one of its own.
    return config is not None and config is model.peft_config.get(POLICY)


@torch.no_grad()
def copy_adapter(model: PeftModel, source: str, target: str) -> int:
    """
    Copy in place every tensor of adapter `source` to adapter `target`: parameters, buffers, and tensors in plain
    dictionaries.

    Returns:
        `int`: how many tensors were copied.

    Raises:
        `InputError`: the two do not have the same tensors with the same shapes, or none can be found.
    """
    copied = 0
    for where, old, new in _pairs(model, source, target):
        with gather_params_ctx([old, new]):
            if old.shape != new.shape:
                raise _cannot_copy(f"{where} is {_shape(old)} in it and {_shape(new)} in a new one", source)
            new.copy_(old)
        copied += 1
    if not copied:
        raise _cannot_copy(f"{model.peft_config[source].peft_type.value} keeps no weights under its name", source)
    return copied


def _pairs(model: PeftModel, source: str, target: str) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for path, owner in model.named_modules():
        if not isinstance(owner, _OWNERS):
            continue
        for attribute, container in [*owner.named_children(), *vars(owner).items()]:
            if not isinstance(container, _CONTAINERS) or source not in container:
                continue
            where = f"{path}.{attribute}".lstrip(".")
            old = _tensors(container[source])
            new = _tensors(container[target]) if target in container else {}
            if old.keys() != new.keys():
                names = ", ".join(sorted(name or "its weight" for name in old.keys() ^ new.keys()))
                raise _cannot_copy(f"{where}: {names} is in one of the two only", source)
            yield from ((where, old[name], new[name]) for name in old)


def _tensors(value) -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {"": value}
    if isinstance(value, nn.Module):
        return dict([*value.named_parameters(), *value.named_buffers()])
    return {}


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _cannot_copy(reason: str, source: str) -> InputError:
    return InputError(
        f"The reference of the trained adapter {source!r} cannot be made: {reason}. Merge the adapter into its base "
        "model (merge_and_unload), and give the trainer the result with a new peft_config."
    )
