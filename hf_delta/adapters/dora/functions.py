"""The DoRA linear map `y = m / n * (W x + s B A x) + b` with its norm `n` given: no tensor of the size of `W` is made."""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hf_delta.ops.norms import widened


def usable_norm(norm: torch.Tensor) -> torch.Tensor:
    """`n` with infinity for the rows of zeros, which have no direction: divided by it they stay zeros."""
    return norm.masked_fill(norm == 0, torch.inf)


def gain(magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """`g = m / n`, `(o,)`, in float32 or wider: in bfloat16 most gains of a trained adapter would round to 1."""
    return magnitude.to(widened(magnitude.dtype)) / norm


def compose_change(
    base: torch.Tensor, lora: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor, scaling: float
) -> torch.Tensor:
    """What DoRA adds to the base output: `(g - 1) W x + g s B A x`, for autograd, in float32 or wider.

    Args:
        base: `W x`, without bias, `(..., o)`.
        lora: `B A x`, `(..., o)`.
        magnitude: `m`, `(o,)`, the only factor of `g = m / n` that takes a gradient.
        norm: `n`, `(o,)`, from [`usable_norm`].
        scaling: `s`.
    """
    # Shaped `(1, o)` and wide, so that products with 16-bit outputs are taken in float32 and keep no float32 copies.
    g = gain(magnitude, norm).unsqueeze(0)
    return (g - 1) * base + (g * scaling) * lora


def dora_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    g: torch.Tensor,
    shift: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`g (W x + s B A x) + b`, written in place over the base output.

    Args:
        x: `(..., i)`.
        g: `(o,)`, float32 or wider.
        shift: `(1 - g) b`, or None without a bias. With it `g = 1` gives the base output to the last bit.

    Returns:
        The output `(..., o)` and `A x` `(T, r)` for the `T` rows of `x`.
    """
    ax = nn.functional.linear(x, a).view(-1, len(a))
    y = nn.functional.linear(x, weight, bias)
    y.view(-1, len(weight)).addmm_(ax, b.T, alpha=scaling)
    if shift is None:
        y.mul_(g)
    else:
        torch.addcmul(shift, y, g, out=y)
    return y, ax


def bias_shift(bias: torch.Tensor | None, g: torch.Tensor) -> torch.Tensor | None:
    """`(1 - g) b`, `(o,)`: what `g (W x + b)` lacks to have the whole bias."""
    return None if bias is None else (1 - g) * bias


class FusedDora(torch.autograd.Function):
    """DoRA linear layer with one base product in each direction and one temporary of the size of the output.

    Kept for backward: `x`, `A x` and the output itself, from which the gradient of the magnitude is
    `dm = sum_t dy (y - b) / m`. Rows whose magnitude is exactly 0 left nothing in the output and are computed again.

    Args:
        x: `(..., i)`.
        weight: `W`, `(o, i)`, frozen.
        bias: `(o,)` or None, frozen.
        a, b: `A`, `(r, i)` and `B`, `(o, r)`, any floating dtype.
        magnitude: `m`, `(o,)`.
        norm: `n`, `(o,)`, from [`usable_norm`], constant in backward (DoRA, section 4.3, https://huggingface.co/papers/2402.09353).
        scaling: `s`.
        some_zero: whether any magnitude is exactly 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        magnitude: torch.Tensor,
        norm: torch.Tensor,
        scaling: float,
        some_zero: bool,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        g = gain(magnitude, norm)
        y, ax = dora_output(x, weight, bias, a.to(x.dtype), b.to(x.dtype), g, bias_shift(bias, g), scaling)
        _, _, _, needs_a, needs_b, needs_m = ctx.needs_input_grad[:6]
        kept_rows = rows if needs_a or (needs_m and some_zero) else None
        kept_ax = ax if needs_b or (needs_m and some_zero) else None
        ctx.save_for_backward(kept_rows, kept_ax, y if needs_m else None, weight, bias, a, b, magnitude, norm)
        ctx.scaling, ctx.some_zero, ctx.shape = scaling, some_zero, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, ax, y, weight, bias, a, b, magnitude, norm = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, needs_m = ctx.needs_input_grad[:6]
        dx = da = db = dm = buffer = None
        dy = dy.reshape(-1, dy.shape[-1])
        g = gain(magnitude, norm)
        gs = (g * ctx.scaling).unsqueeze(1)
        if needs_m:
            buffer = torch.mul(dy, y.view_as(dy))
            dm = _magnitude_gradient(buffer, dy, bias, magnitude)
            if ctx.some_zero:
                dm = _with_zero_magnitudes(dm, dy, rows, ax, weight, b, magnitude, norm, ctx.scaling)
        if needs_x or needs_a:
            dax = dy @ (b * gs).to(dy.dtype)
        if needs_b:
            db = ((dy.T @ ax) * gs).to(b.dtype)
        if needs_a:
            da = (dax.T @ rows).to(a.dtype)
        if needs_x:
            buffer = torch.mul(dy, g, out=torch.empty_like(dy) if buffer is None else buffer)
            dx = (buffer @ weight).addmm_(dax, a.to(dy.dtype)).view(ctx.shape)
        return dx, None, None, da, db, dm, None, None, None


def _magnitude_gradient(
    products: torch.Tensor, dy: torch.Tensor, bias: torch.Tensor | None, magnitude: torch.Tensor
) -> torch.Tensor:
    total = products.sum(dim=0, dtype=widened(products.dtype))
    if bias is not None:
        total -= bias * dy.sum(dim=0, dtype=total.dtype)
    return (total / magnitude.masked_fill(magnitude == 0, torch.inf)).to(magnitude.dtype)


def _with_zero_magnitudes(
    dm: torch.Tensor,
    dy: torch.Tensor,
    rows: torch.Tensor,
    ax: torch.Tensor,
    weight: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor,
    norm: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    zero = (magnitude == 0).nonzero().squeeze(1)
    directions = rows @ weight[zero].T + scaling * (ax @ b[zero].to(ax.dtype).T)
    sums = (dy[:, zero] * directions).sum(dim=0, dtype=widened(dy.dtype))
    dm[zero] = (sums / norm[zero]).to(dm.dtype)
    return dm
