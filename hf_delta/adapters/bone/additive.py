"""Blocks that are added to the weight: `bone`, `mini` and `row`; torch only.

The columns of a weight `(o, i)` are cut into pieces of `r` (the last may be shorter), and every piece gets the same
change `D^T`. So the layer adds `fold(x) @ D`, where `fold` sums the pieces of the input: `(..., i)` to `(..., r)`.

Paper: arXiv:2409.15371, whose versions call it Bone, DiSHA and MiSS.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def fold(x: torch.Tensor, r: int) -> torch.Tensor:
    """Sum of the consecutive pieces of `r` inputs; the last piece may be shorter.

    `fold(x)[..., k] = sum over j = k mod r of x[..., j]`

    Args:
        x (`torch.Tensor`): `(..., i)`.
        r (`int`): size of a piece, at most `i`.

    Returns:
        `torch.Tensor`: `(..., r)`.
    """
    if x.shape[-1] % r == 0:
        return x.unflatten(-1, (x.shape[-1] // r, r)).sum(-2)
    whole = x.shape[-1] - x.shape[-1] % r
    folded, rest = x[..., :whole].unflatten(-1, (-1, r)).sum(-2), x[..., whole:]
    return torch.cat([folded[..., : rest.shape[-1]] + rest, folded[..., rest.shape[-1] :]], dim=-1)


def add_folded_(x: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """Add `folded (T, r)` to every piece of `r` columns of a contiguous `x (T, i)`, in place: the transpose of [`fold`]."""
    r = folded.shape[-1]
    whole = x.shape[-1] - x.shape[-1] % r
    x[:, :whole].unflatten(-1, (whole // r, r)).add_(folded.unsqueeze(-2))
    if whole < x.shape[-1]:
        x[:, whole:].add_(folded[:, : x.shape[-1] - whole])
    return x


def tile(x: torch.Tensor, size: int) -> torch.Tensor:
    """Repeat the last dimension up to `size` columns, a multiple of what it has, without copying the input first."""
    if x.shape[-1] == size:
        return x
    times = size // x.shape[-1]
    return x.unsqueeze(-2).expand(*x.shape[:-1], times, x.shape[-1]).flatten(-2)


def additive_delta(block: torch.Tensor, out_features: int, in_features: int) -> torch.Tensor:
    """Change of the weight `(o, i)` for a block `(r, o)` of `bone` or `(r, mini_r)` of `mini`.

    `delta[a, j] = block[j mod r, a mod mini_r]`
    """
    pieces = -(-in_features // block.shape[0])
    return block.t().repeat(out_features // block.shape[1], pieces)[:, :in_features]


def additive_factors(block: torch.Tensor, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`A (k, i)` and `B (o, k)` with `B @ A` equal to [`additive_delta`] and `k = min(r, mini_r)`.

    One factor says which column (or row) belongs to which row (or column) of the block and holds zeros and ones only.
    """
    r, width = block.shape
    if width < r:
        ones = torch.eye(width, dtype=block.dtype, device=block.device)
        return additive_delta(block, width, in_features), ones.repeat(out_features // width, 1)
    ones = torch.eye(r, dtype=block.dtype, device=block.device)
    return additive_delta(ones, r, in_features), additive_delta(block, out_features, r)


def additive_output(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `(T, o)` of [`AdditiveLinear`] and `fold(x)`, `(T, r)`, without autograd."""
    folded = fold(x, block.shape[0])
    output = F.linear(x, weight, bias)
    if block.shape[1] == output.shape[1]:
        output.addmm_(folded, block)
    else:
        add_folded_(output, folded @ block)
    return output, folded


class AdditiveLinear(Function):
    """`x W^T + bias + tile(fold(x) D)` for a frozen weight, with one allocation per direction beyond its result's.

    Shapes: `x (T, i)`, `weight (o, i)`, `bias (o,)` or `None`, `block (r, m)` where `m` divides `o`; all of one dtype.
    Kept for the backward pass: `fold(x)`, which is `(T, r)`, and references to weight and block.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, block):
        output, folded = additive_output(x, weight, bias, block)
        ctx.save_for_backward(folded, weight, block)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        folded, weight, block = ctx.saved_tensors
        narrow = grad if block.shape[1] == grad.shape[1] else fold(grad, block.shape[1])
        grad_x = grad_block = None
        if ctx.needs_input_grad[3]:
            grad_block = folded.t() @ narrow
        if ctx.needs_input_grad[0]:
            grad_x = add_folded_(grad @ weight, narrow @ block.t())
        return grad_x, None, None, grad_block


def row_output(x: torch.Tensor, block: torch.Tensor, out_features: int) -> torch.Tensor:
    """`(..., o)` out of `D x`, for `D (r, i)`: value `n` stands for the `n`-th shard of `o / r` consecutive outputs."""
    shared = F.linear(x, block).unsqueeze(-1)
    return shared.expand(*shared.shape[:-1], out_features // block.shape[0]).flatten(-2)


def row_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, block: torch.Tensor) -> torch.Tensor:
    """`x W^T + bias` with [`row_output`] added in place; no autograd."""
    output = F.linear(x, weight, bias)
    shards = block.shape[0], output.shape[-1] // block.shape[0]
    output.unflatten(-1, shards).add_(F.linear(x, block).unsqueeze(-1))
    return output


def row_delta(block: torch.Tensor, out_features: int) -> torch.Tensor:
    """Change of the weight `(o, i)` for a block `(r, i)`: each row stands for `o / r` consecutive rows."""
    return block.repeat_interleave(out_features // block.shape[0], dim=0)


def row_factors(block: torch.Tensor, out_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`A (r, i)` and `B (o, r)` with `B @ A` equal to [`row_delta`]; `B` holds zeros and ones."""
    ones = torch.eye(block.shape[0], dtype=block.dtype, device=block.device)
    return block, row_delta(ones, out_features)
