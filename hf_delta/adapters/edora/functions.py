"""EDoRA as functions of tensors: frozen factors of a weight, norms of the changed rows, outputs and their gradients.

With frozen `U` `(o, r)` and `A = U^T W` `(r, i)`, a trained core `R` `(r, r)` and magnitude `m` `(o,)`:

`W' = diag(m / n) (W + s U R A)`, where `n` is the norm of each row of the bracket, taken as a constant.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from hf_delta.ops.lowrank import truncated_svd
from hf_delta.ops.norms import widened


# Columns that the randomised SVD carries beyond r.
OVERSAMPLING = 10
# Stands for a magnitude of exactly 0 in a training step, see `EdoraFunction`.
SMALLEST_MAGNITUDE = 1e-20


@torch.no_grad()
def top_factors(weight: torch.Tensor, r: int, svd: str, niter: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `r` left singular vectors `U` of a weight, and `A = U^T W`, which is `S_r V_r^T`.

    `"full"` is LAPACK's SVD. `"lowrank"` takes `niter` power iterations on a random sketch of `r + 10` columns drawn from
    `seed`; `A = U^T W` holds as exactly as for the full one, and `U` spans nearly the same space.

    Args:
        weight: `(o, i)`.

    Returns:
        `U` `(o, r)` and `A` `(r, i)`, in float32 or wider.
    """
    weight = weight.to(widened(weight.dtype))
    if svd == "full":
        left = torch.linalg.svd(weight, full_matrices=False)[0][:, :r]
    else:
        scaled = truncated_svd(weight, r, oversampling=OVERSAMPLING, power_steps=niter, seed=seed)[0]
        # Its columns are orthogonal already: this gives them length 1, also where a singular value is 0.
        left = torch.linalg.qr(scaled)[0]
    left = left.contiguous()
    return left, left.T @ weight


@torch.no_grad()
def changed_row_norms(
    norms: torch.Tensor, cross: torch.Tensor, gram: torch.Tensor, change: torch.Tensor
) -> torch.Tensor:
    """Norm of each row of `W + C A` for a change `C` in the space of `A`, without `W`; `o r^2` operations.

    `n_i^2 = ||W_i||^2 + q_i`, `q_i = <C_i, 2 (W A^T)_i + (C A A^T)_i>`. With `C = 0` it returns `norms` bit for bit: what
    is computed is `||W_i|| + q_i / (n_i + ||W_i||)`, because the root of a square need not be the number itself.

    Args:
        norms: `||W_i||`, `(o,)`, float32 or wider.
        cross: `2 W A^T`, `(o, r)`.
        gram: `A A^T`, `(r, r)`.
        change: `C = s U R`, `(o, r)`.
    """
    grown = torch.addmm(cross, change, gram).mul_(change).sum(dim=1)
    twice = torch.addcmul(grown, norms, norms).clamp_(min=0).sqrt_().add_(norms)
    return grown.div_(twice.clamp_(min=torch.finfo(twice.dtype).tiny)).add_(norms).clamp_(min=0)


def as_divisor(norms: torch.Tensor) -> torch.Tensor:
    """The norms with infinity for 0, so that the gain `m / n` of a row of zeros is 0 and not NaN."""
    return norms.masked_fill(norms == 0, float("inf"))


def low_rank_output(
    x: torch.Tensor, right: torch.Tensor, core: torch.Tensor, left: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`s U R A x`, `(..., o)`."""
    return linear(linear(linear(x, right), core), left) * scaling


def scaled_change(
    base_output: torch.Tensor, bias: torch.Tensor | None, low_rank: torch.Tensor, gain: torch.Tensor
) -> torch.Tensor:
    """What is added to the base output when the rows of `W + C A` are multiplied by `gain`.

    `(g - 1) (base - b) + g low_rank`, in float32 or wider: in bfloat16 `g - 1` would vanish.

    Args:
        base_output: `W x + b`, `(..., o)`.
        low_rank: `C A x`, `(..., o)`.
        gain: `g = m / n`, `(o,)`, float32 or wider.
    """
    wide = widened(base_output.dtype)
    without_bias = base_output.to(wide) if bias is None else base_output.to(wide) - bias.to(wide)
    return torch.addcmul((gain - 1) * without_bias, low_rank.to(wide), gain)


def fused_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    inner: torch.Tensor,
    outer: torch.Tensor,
    gain: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole output of a dense linear layer, in the memory of one output where there is no bias.

    With `t = W x + b + C inner`, `y = g t + (1 - g) b`: where the change is 0 and `g = 1` these are the bits of `W x + b`.

    Args:
        x: `(T, i)`.
        inner: `(T, r)`.
        outer: `C`, `(o, r)`.
        gain: `g`, `(o,)`, or None for 1.

    Returns:
        `y` and `t`, both `(T, o)`, the same tensor where there is no bias or no gain.
    """
    total = linear(x, weight, bias).addmm_(inner, outer.T)
    if gain is None:
        return total, total
    if bias is None:
        return total.mul_(gain), total
    return torch.addcmul((1 - gain) * bias, total, gain).to(total.dtype), total


class EdoraFunction(torch.autograd.Function):
    """[`fused_forward`] with its gradients to `x`, `R` and `m`.

    Saves `A x` `(T, r)` and one tensor `(T, o)`, which is the output itself where there is no bias; with no magnitude
    `A x` alone. `x` is not saved: nothing that multiplies it is trained.

    The gradient of `m_i` is read from the output as `sum_t dy_ti y_ti / m_i`, so that a magnitude of exactly 0 counts as
    1e-20.

    Args:
        x: `(T, i)`, of the dtype of `weight`, `left` and `right`.
        core: `R`, `(r, r)`, any dtype.
        magnitude: `m`, `(o,)`, any dtype, or None: no rescaling.
        norms: `n`, `(o,)`, float32 or wider, infinite for rows of zeros; a constant.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, right, left, core, magnitude, norms, scaling):
        gain = divisor = None
        if magnitude is not None:
            wide = magnitude.to(norms.dtype)
            divisor = wide.masked_fill(wide == 0, SMALLEST_MAGNITUDE)
            gain = divisor / norms
        inner = x @ right.T
        output, total = fused_forward(x, weight, bias, linear(inner, (core * scaling).to(x.dtype)), left, gain)
        ctx.scaling = scaling
        saved = None if magnitude is None else total
        ctx.save_for_backward(weight, bias, right, left, core, magnitude, divisor, norms, gain, inner, saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, bias, right, left, core, magnitude, divisor, norms, gain, inner, total = ctx.saved_tensors
        grad_magnitude = grad_x = None
        scratch = None
        if magnitude is not None:
            scratch = grad * total
            sums = scratch.sum(dim=0, dtype=norms.dtype)
            if bias is None:
                sums = sums / divisor
            else:
                sums = (sums - grad.sum(dim=0, dtype=norms.dtype) * bias) / norms
            grad_magnitude = sums.to(magnitude.dtype)
            left = (left * gain[:, None]).to(left.dtype)
        outer = grad @ left
        grad_core = (outer.T @ inner).mul_(ctx.scaling).to(core.dtype)
        if ctx.needs_input_grad[0]:
            grad_total = grad if gain is None else torch.mul(grad, gain, out=scratch)
            grad_x = (grad_total @ weight).addmm_(outer @ core.to(outer.dtype), right, alpha=ctx.scaling)
        return grad_x, None, None, None, None, grad_core, grad_magnitude, None, None
