"""What FSDP2 does to a trained head, which TRL's fused head reads and nobody calls, and to what a model gives."""

from dataclasses import replace

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule


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
    if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
