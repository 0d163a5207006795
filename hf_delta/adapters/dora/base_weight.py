"""What the norm needs of a base layer, dense or quantised, without a dense copy of its weight where that is possible."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_delta._compat.bitsandbytes import dequantised_weight
from hf_delta._compat.torch import runs_plainly
from hf_delta.ops.gather import full_tensor
from hf_delta.ops.norms import row_square_norms, times_transposed, widened


def stored_weight(base_layer: nn.Module) -> torch.Tensor:
    """The tensor in which a base layer keeps its weight, dense or not."""
    if type(base_layer) is not nn.Linear and hasattr(base_layer, "W_q"):
        return base_layer.W_q
    return base_layer.weight


def base_square_norms(base_layer: nn.Module, transposed: bool) -> torch.Tensor:
    """`||W_i||^2`, `(o,)`, float32 or wider; needed once per weight, because the weight is frozen.

    4-bit weights are dequantised for it, 8-bit ones a few rows at a time.
    """
    rows, scale = _int8_rows(base_layer)
    if rows is not None:
        return row_square_norms(rows) * scale.square()
    weight = full_tensor(dequantised_weight(base_layer))
    return row_square_norms(weight.T if transposed else weight)


def base_times_transposed(base_layer: nn.Module, a: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`W A^T`, `(o, r)`: read from the weight where it is dense, else the base layer's output for `r` more tokens `A`."""
    rows, scale = _int8_rows(base_layer)
    if rows is not None:
        return times_transposed(rows, a) * scale.unsqueeze(1)
    if type(base_layer) in (nn.Linear, Conv1D) and runs_plainly(base_layer):
        weight = base_layer.weight
        return times_transposed(weight.T if transposed else weight, a)
    output = base_layer(a.to(_input_dtype(base_layer, a)))
    bias = getattr(base_layer, "bias", None)
    output = output.to(widened(output.dtype))
    return (output if bias is None else output - bias).T


def _int8_rows(base_layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """The integers `(o, i)` and the factor of each row `(o,)` of a bitsandbytes 8-bit layer.

    Its kernel quantises the input, which would cost the norm two digits.
    """
    weight = stored_weight(base_layer)
    if type(weight).__name__ != "Int8Params" or weight.dtype != torch.int8:
        return None, None
    largest = base_layer.state.SCB if base_layer.state.SCB is not None else weight.SCB
    return weight.data, largest.to(weight.device, torch.float32) / 127


def _input_dtype(base_layer: nn.Module, a: torch.Tensor) -> torch.dtype:
    computes_in = getattr(base_layer, "compute_dtype", None)
    if computes_in is not None:
        return computes_in
    weight = stored_weight(base_layer)
    return weight.dtype if weight.dtype.is_floating_point else a.dtype
