"""Blocks that also multiply the weight: `bat_row` and `bat_col`; torch only.

The weight `(o, i)` is cut into blocks `W_ab` of `(r, r)`, output block `a`, input block `b`:

    bat_row: W'_ab = W_ab + W_ab D_b + D_b, one D for every input block
    bat_col: W'_ab = W_ab + W_ab D_a + D_a, one D for every output block

With one D per input block the change can be moved to the input, `u_b = D_b x_b`, and no W' is needed:
`y = W (x + u) + tile(sum over b of u_b)`. With one D per output block it cannot, so W' is formed a few rows at a time.
"""

from collections.abc import Callable, Iterator

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hf_delta.adapters.bone.additive import add_folded_, fold


# Rows of W' that exist at one time in `bat_col`: fewer are slower from 128 down, more are no faster.
ROWS = 256

Weight = torch.Tensor | Callable[[], torch.Tensor]


def block_inputs(x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """`u (..., i)` with `u_b = D_b x_b` for `x (..., i)` and `block (i / r, r, r)`."""
    pieces = x.reshape(-1, block.shape[0], block.shape[1]).transpose(0, 1)
    return torch.bmm(pieces, block.transpose(1, 2)).transpose(0, 1).reshape(x.shape)


def bat_row_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: torch.Tensor
) -> torch.Tensor:
    """`(x + u) W^T + bias + tile(sum over b of u_b)` for `x (T, i)` and `u` of [`block_inputs`]; no autograd."""
    pieces = x.view(len(x), *block.shape[:2])
    u = torch.bmm(pieces.transpose(0, 1), block.transpose(1, 2))
    output = F.linear((pieces + u.transpose(0, 1)).view(x.shape), weight, bias)
    shards = output.shape[1] // block.shape[1], block.shape[1]
    output.unflatten(1, shards).add_(u.sum(0).unsqueeze(1))
    return output


def bat_row_delta(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Change of the weight `(o, i)`: `W_ab D_b + D_b` for `block (i / r, r, r)`."""
    pieces, r, _ = block.shape
    columns = weight.reshape(-1, pieces, r).transpose(0, 1)
    change = torch.bmm(columns, block).transpose(0, 1).reshape(weight.shape[0] // r, r, pieces, r)
    return (change + block.transpose(0, 1)).reshape(weight.shape)


def bat_col_delta(weight: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Change of the weight `(o, i)`: `W_ab D_a + D_a` for `block (o / r, r, r)`."""
    shards, r, _ = block.shape
    change = torch.bmm(weight.reshape(shards, -1, r), block).view(shards, r, -1, r)
    return change.add_(block.unsqueeze(2)).view(weight.shape)


class BatColLinear(Function):
    """`x W'^T + bias` with W' of `bat_col`, formed [`ROWS`] rows at a time in both directions and never kept.

    The term `D_a` is the same for all input blocks and goes through `fold(x)`, so only `W_ab + W_ab D_a` is formed. For
    a few tokens, as in decoding, not even that: `D_a` goes to the input of each output block.

    Shapes: `x (T, i)`, `weight (o, i)` or a function that returns it (a dequantisation, called again in the backward
    pass), `bias (o,)` or `None`, `block (o / r, r, r)`, all of one dtype. `only_change` leaves W itself out.
    Kept for the backward pass: references to `x`, block and the weight or its function.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, block, only_change):
        ctx.only_change = only_change
        ctx.weight = None if isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(x, block, weight if ctx.weight is None else None)
        weight = _whole(weight)
        output = F.linear(fold(x, block.shape[1]), block.flatten(0, 1), bias)
        product = _few_tokens_product if 2 * x.shape[0] <= block.shape[1] else _product
        for shard, part in _row_parts(block):
            product(output[:, part], x, weight[part].to(x.dtype), block[shard], only_change)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, block, weight = ctx.saved_tensors
        # In-place products do not cast, so autocast around `backward()` would mix dtypes.
        with torch.autocast(x.device.type, enabled=False):
            weight = _whole(weight if ctx.weight is None else ctx.weight)
            grad_x, grad_block = _bat_col_gradients(grad, x, weight, block, ctx.only_change, ctx.needs_input_grad)
        return grad_x, None, None, grad_block, None


def _bat_col_gradients(grad, x, weight, block, only_change, needed):
    grad_x = grad_block = None
    if needed[0]:
        grad_x = add_folded_(torch.zeros_like(x), grad @ block.flatten(0, 1))
    if needed[3]:
        grad_block = (grad.t() @ fold(x, block.shape[1])).view_as(block)
    for shard, part in _row_parts(block):
        rows = weight[part].to(x.dtype)
        if grad_x is not None:
            grad_x.addmm_(grad[:, part], _multiplied(rows, block[shard], only_change))
        if grad_block is not None:
            of_rows = (grad[:, part].t() @ x).view(-1, x.shape[1], block.shape[2])
            grad_block[shard].baddbmm_(rows.reshape(of_rows.shape).transpose(1, 2), of_rows)
    return grad_x, grad_block


def _whole(weight: Weight) -> torch.Tensor:
    return weight if isinstance(weight, torch.Tensor) else weight()


def _row_parts(block: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of the shards, and of the rows that they cover, about [`ROWS`] rows each."""
    shards, r, _ = block.shape
    step = max(1, ROWS // r)
    for start in range(0, shards, step):
        stop = min(start + step, shards)
        yield slice(start, stop), slice(start * r, stop * r)


def _multiplied(rows: torch.Tensor, block: torch.Tensor, only_change: bool) -> torch.Tensor:
    """`W_ab + W_ab D_a`, or the second term alone, for rows `(k r, i)` of W and their blocks `(k, r, r)`."""
    flat = rows.reshape(len(block), rows.shape[1], -1)
    return (torch.bmm(flat, block) if only_change else torch.baddbmm(flat, flat, block)).view(rows.shape)


def _product(
    output: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, only_change: bool
) -> None:
    """Add `x (T, i)` times [`_multiplied`] rows to `output (T, k r)`."""
    output.addmm_(x, _multiplied(rows, block, only_change).t())


def _few_tokens_product(
    output: torch.Tensor, x: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, only_change: bool
) -> None:
    """The same as `W_a (x + u_a)` with `u_ab = D_a x_b`: `k T i` numbers in the place of `k r i`."""
    shards, r, _ = block.shape
    u = torch.matmul(x.reshape(-1, r), block.transpose(1, 2)).view(shards, *x.shape)
    if not only_change:
        u += x
    product = torch.bmm(u, rows.reshape(shards, r, -1).transpose(1, 2))
    output.unflatten(1, (shards, r)).add_(product.transpose(0, 1))
