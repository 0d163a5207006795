"""What FSDP2 does to a trained head, which TRL's fused head reads and nobody calls, and to what a model gives."""

from collections import Counter
from dataclasses import replace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from peft.utils.other import ModulesToSaveWrapper
from torch.distributed.fsdp import FSDPModule

from hf_delta.errors import InputError


def check_trained_whole(model: torch.nn.Module) -> None:
    """
    Raises:
        `InputError`: a module that is trained whole beside an adapter is tied to another one, so that Accelerate would put one
            weight into two units of FSDP2.
    """
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            if any(holders[id(parameter)] > 1 for parameter in module.original_module.parameters()):
                raise InputError(
                    f"modules_to_save: {name.rpartition('.')[-1]} is tied to another module, in which case FSDP2 cannot shard "
                    "its original. Leave it out of modules_to_save, or take data parallel or DeepSpeed instead of FSDP."
                )


def unshard_trained_head(model: torch.nn.Module) -> None:
    """Have FSDP2 gather a trained head whenever the model is called, and average its gradient as it does all others.

    FSDP2 does both for units that are called. Under PEFT (`modules_to_save: [lm_head]`) Accelerate makes the head a unit of its
    own, and TRL 1.16 multiplies with its weight, which it gathers itself: then every process keeps, in its shard, the gradient
    of its own batch alone.

    Args:
        model (`PreTrainedModel` or `PeftModel`): As the trainer calls it.
    """
    model.register_forward_pre_hook(_unshard_head)


def _unshard_head(model: torch.nn.Module, inputs: tuple) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule) and any(parameter.requires_grad for parameter in head.parameters()):
        head.unshard()


def keep_outputs(plugin: FullyShardedDataParallelPlugin) -> None:
    """Have FSDP2 hand on what a model computes in the dtype in which it was computed.

    With mixed precision, Accelerate has it rounded to the dtype of the computation: log-probabilities of -3 nats to steps of
    1/64 in bfloat16, and differences between policy and reference with them.
    """
    if plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
