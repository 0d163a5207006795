"""Activations of a model, counted while one of its blocks runs forward and backward on tensors without memory."""

import copy
import logging
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PretrainedConfig

from hf_delta._compat.live import LiveBytes, give_shapes, shapes_only
from hf_delta.adapters.base import DeltaLinear
from hf_delta.adapters.dora import fast_dora
from hf_delta.adapters.pmss.layer import PmssLinear
from hf_delta.errors import InputError
from hf_delta.plan.parts import Activations
from hf_delta.plan.shapes import adapt, backbone_of, blocks_of, plain, shapes_of, shortened


logger = logging.getLogger(__name__)

_known: dict[str, tuple[Activations, bool]] = {}


@dataclass(frozen=True)
class Pass:
    """
    A micro-batch as the backbone sees it.

    Args:
        sequences (`int`): Rows.
        tokens (`int`): Of each.
        dtype (`torch.dtype`): Of the weights.
        autocast (`torch.dtype`, *optional*): Dtype that accelerate computes in, where it is another.
        checkpointing (`bool`): Gradient checkpointing.
        attention (`str`, *optional*): `attn_implementation`.
        fast_dora (`bool`): Whether DoRA is hf_delta's.
    """

    sequences: int
    tokens: int
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    checkpointing: bool = False
    attention: str | None = None
    fast_dora: bool = False


def activations(config: PretrainedConfig, peft: PeftConfig | None, batch: Pass) -> tuple[Activations, bool]:
    """Bytes of activations, and whether the adapter is in them.

    Where the adapter does something that shapes cannot tell, those of the model alone.

    Raises:
        `InputError`: the model itself does.
    """
    key = f"{config.to_json_string()} {peft} {batch}"
    if key not in _known:
        _known[key] = _trace_or_less(config, peft, batch)
    return _known[key]


def _trace_or_less(config: PretrainedConfig, peft: PeftConfig | None, batch: Pass) -> tuple[Activations, bool]:
    if peft is not None:
        try:
            with fast_dora() if batch.fast_dora else nullcontext():
                return _trace(config, peft, batch), True
        except Exception as error:  # whatever a layer may do with values
            logger.debug("Activations with the adapter cannot be counted: %r", error)
    try:
        return _trace(config, None, batch), peft is None
    except InputError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(
            f"model_name_or_path: {config.model_type} cannot run on shapes alone, so that its activations cannot be counted "
            f"and there is no plan for it ({reason:.200}). Run the recipe without dry_run."
        ) from error


def _trace(config: PretrainedConfig, peft: PeftConfig | None, batch: Pass) -> Activations:
    model = shapes_of(shortened(config, 1), batch.dtype, batch.attention)
    if peft is not None:
        peft = copy.deepcopy(peft)
        if getattr(peft, "layers_to_transform", None) is not None:
            # The blocks that are left are not those that are meant.
            peft.layers_to_transform, peft.layers_pattern = None, None
        model = adapt(model, peft)
    with shapes_only() as live, warnings.catch_warnings():
        # Of what training does anyhow, and of an address that only says whether a tensor is another one.
        warnings.simplefilter("ignore")
        give_shapes(model)
        if batch.checkpointing:
            if peft is not None:
                model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            _take_as_checked(module)
        return _measure(model.train(), live, batch)


def _measure(model: nn.Module, live: LiveBytes, batch: Pass) -> Activations:
    # Adapters derive some tensors from the weight in their first pass, and keep them.
    start = live.now
    _forward(model, live, batch)
    derived, start = live.now - start, live.now
    marks: list[int] = []
    (block,) = blocks_of(plain(model))
    # Twice with gradient checkpointing; the first pass counts.
    block.register_forward_pre_hook(lambda *_: marks.append(live.now))
    block.register_forward_hook(lambda *_: marks.append(live.now))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)
    live.peak = live.now
    hidden, inside = _forward(model, live, batch)
    casts = inside - live.now
    kept, top = live.now - start, live.peak - start
    live.peak = live.now
    if hidden.requires_grad:
        hidden.backward(torch.empty_like(hidden))
    saved = marks[1] - marks[0] - casts
    return Activations(kept - saved, saved, top - kept, live.peak - start - kept, derived, casts)


def _forward(model: nn.Module, live: LiveBytes, batch: Pass) -> tuple[torch.Tensor, int]:
    """Hidden states, and the bytes that there are before autocast lets go of its copies of weights."""
    ids = torch.zeros(batch.sequences, batch.tokens, dtype=torch.long)
    with torch.autocast("cpu", dtype=batch.autocast or torch.bfloat16, enabled=batch.autocast is not None):
        hidden = backbone_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        return hidden, live.now


def _take_as_checked(module: nn.Module) -> None:
    """Adapters of hf_delta look at their values before they are first used, and here there are none."""
    if isinstance(module, DeltaLinear):
        module.unchecked = set()
    if isinstance(module, PmssLinear):
        module.hfd_pmss_scaling = dict.fromkeys(module.adapters, 1.0)


def _forget(parameter: Any) -> None:
    # Gradients are counted elsewhere.
    parameter.grad = None
