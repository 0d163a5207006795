"""`W' = W + s C U R` with columns `C` and rows `R` of `W`; torch only.

Because `R = W[rows]` and `C = W[:, columns]`, both outer products can be read from products that are computed anyway:

`R x = (W x)[rows]` in the forward pass, `C^T g = (W^T g)[columns]` in the backward pass.
"""

import numpy as np
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


# Random products with which two skeletons are compared.
PROBES = 16


def pmss_delta(columns: torch.Tensor, core: torch.Tensor, rows: torch.Tensor, scaling: float) -> torch.Tensor:
    """Change of the weight, `s C U R`: `(o, i)`.

    Args:
        columns: `C`, `(o, k)`.
        core: `U`, `(k, k)`.
        rows: `R`, `(k, i)`.
        scaling: `s`.
    """
    return (columns @ core).mul_(scaling) @ rows


def pmss_output(read: torch.Tensor, core: torch.Tensor, columns: torch.Tensor, scaling: float) -> torch.Tensor:
    """What the adapter adds to an output, `s C U z` with `z = R x`: `(..., k)` to `(..., o)`."""
    return F.linear(F.linear(read, core) * scaling, columns)


class PmssFunction(Function):
    """`x W^T + s (z U^T) C^T + b` with `z = (x W^T)[:, rows]`, for a frozen weight.

    Beyond what is kept anyway it saves `z`, `(T, k)`; it forms nothing of size `(o, i)`.

    Args:
        x: `(T, i)`.
        weight: `W`, `(o, i)`.
        bias: `(o,)` or None.
        core: `U`, `(k, k)`; may have a wider dtype than the others.
        rows, columns: indices, int64 `(k,)`.
        factor: `C = W[:, columns]`, `(o, k)`, gathered.
        scaling: `s`.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, core, rows, columns, factor, scaling):
        y, z = pmss_linear(x, weight, bias, core, rows, factor, scaling)
        ctx.save_for_backward(z, weight, core, rows, columns, factor)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, weight, core, rows, columns, factor = ctx.saved_tensors
        dx = dcore = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight
            g = dx.index_select(1, columns)
            # Rows lie together in memory; a copy that is kept would cost as much as the columns do.
            dx.addmm_(g @ core.to(g.dtype), weight.index_select(0, rows), alpha=ctx.scaling)
        else:
            g = dy @ factor
        if ctx.needs_input_grad[3]:
            dcore = (g.T @ z).mul_(ctx.scaling).to(core.dtype)
        return dx, None, None, dcore, None, None, None, None


def pmss_linear(x, weight, bias, core, rows, factor, scaling) -> tuple[torch.Tensor, torch.Tensor]:
    """The output `(T, o)` of [`PmssFunction`] and `z`, `(T, k)`, without autograd."""
    y = F.linear(x, weight)
    z = y.index_select(1, rows)
    # The bias comes last: taken out of a sum again, it would cost digits.
    y.addmm_(F.linear(z, core.to(z.dtype)), factor.T, alpha=scaling)
    return (y if bias is None else y.add_(bias)), z


def skeleton_probes(weight: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A few numbers that tell the intersection `K = W[rows][:, columns]` from that of another weight.

    `p_a = u_a^T K v_a` with fixed random signs `u_a`, `v_a`; for independent `K` of norm `f` each is about as large as
    `f`. Before them comes `f` itself. The signs come from a generator whose stream NumPy promises not to change.

    Returns:
        float64 on the CPU, `(1 + PROBES,)`.
    """
    cross = weight.index_select(0, rows).index_select(1, columns).detach().to("cpu").double()
    signs = np.random.RandomState(0).random_sample((2, PROBES, len(rows))) < 0.5
    left, right = torch.from_numpy(np.where(signs, 1.0, -1.0))
    probes = torch.einsum("pa,ab,pb->p", left, cross, right)
    return torch.cat([cross.norm().reshape(1), probes])


def probes_distance(saved: torch.Tensor, found: torch.Tensor) -> float:
    """How far two intersections are apart, relative to the larger norm: about 1.4 for unrelated ones, 0.001 for one that
    was rounded to bfloat16, 0.1 for one in 4 bits."""
    size = torch.maximum(saved[0], found[0])
    if size == 0:
        return 0.0
    return float((saved[1:] - found[1:]).square().mean().sqrt() / size)
