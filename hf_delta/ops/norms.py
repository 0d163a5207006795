"""Norms of the rows of a weight with a low-rank change, without the changed weight."""

from collections.abc import Iterator

import torch
from torch import nn


# Elements of a weight that are widened at a time: 16 MiB in float32.
CHUNK_ELEMENTS = 2**22


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def row_square_norms(weight: torch.Tensor) -> torch.Tensor:
    """Squared norm of each row, `sum_j W_ij^2`, in float32 or wider.

    Args:
        weight: `(o, i)`, any floating dtype, any strides.

    Returns:
        `(o,)`.
    """
    return torch.cat([torch.linalg.vector_norm(rows, dim=1).square_() for rows in _row_chunks(weight)])


def times_transposed(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """`W A^T` in float32 or wider, whatever the dtype of the weight; `2 o i r` operations.

    Args:
        weight: `(o, i)`.
        factor: `A`, `(r, i)`.

    Returns:
        `(o, r)`.
    """
    factor = factor.to(widened(weight.dtype))
    return torch.cat([nn.functional.linear(rows, factor) for rows in _row_chunks(weight)])


def _row_chunks(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    wide = widened(weight.dtype)
    rows = len(weight) if weight.dtype == wide else max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return (chunk.to(wide) for chunk in weight.split(max(1, rows)))


def factored_row_norms(
    square_norms: torch.Tensor,
    weight_times_a: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Norm of each row of `W + s B A` from quantities of size `o`, `o r` and `r^2`:

    `n_i^2 = ||W_i||^2 + 2 s <(W A^T)_i, B_i> + s^2 <(B A A^T)_i, B_i>`

    in float32 or wider. In 16 bits the three terms would cancel to less than the norm of the dense sum is worth.
    (https://huggingface.co/papers/2603.22276)

    Args:
        square_norms: `||W_i||^2`, `(o,)`.
        weight_times_a: `W A^T`, `(o, r)`.
        a: `(r, i)`.
        b: `(o, r)`.
        scaling: `s`.

    Returns:
        `(o,)`.
    """
    wide = widened(torch.promote_types(square_norms.dtype, b.dtype))
    a, b = a.to(wide), b.to(wide)
    cross = (weight_times_a.to(wide) * b).sum(dim=1)
    gram = (b @ (a @ a.T)).mul_(b).sum(dim=1)
    squares = square_norms.to(wide) + (2 * scaling) * cross + (scaling * scaling) * gram
    return squares.clamp_(min=0).sqrt_()
