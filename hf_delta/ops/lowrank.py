"""Low-rank factors of matrices: truncated singular value decompositions, and how much they leave out.

A matrix `(o, i)` of rank `k` is written as `B @ A` with `B` `(o, k)` and `A` `(k, i)`.
"""

import torch


# Below this the whole decomposition costs less than the passes of a randomised one are worth.
EXACT_BELOW = 256
# Vectors and steps of the subspace iteration for a spectral norm.
_SPECTRAL_WIDTH, _SPECTRAL_STEPS = 8, 10


def truncated_svd(
    matrix: torch.Tensor, rank: int, *, oversampling: int | None = None, power_steps: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `B (o, rank)` and `A (rank, i)` of the best approximation of a matrix `(o, i)` in the Frobenius norm.

    Small matrices, and ranks above half of the smaller side, are decomposed exactly. Otherwise the range is found with a
    Gaussian sketch and `power_steps` subspace iterations, each re-orthogonalised (Halko, Martinsson and Tropp 2011,
    algorithm 4.4). The singular values are shared evenly: `B = U sqrt(S)`, `A = sqrt(S) V'`.

    Args:
        matrix (`torch.Tensor`): `(o, i)`; half precision is computed in float32.
        rank (`int`): How many singular vectors to keep. Beyond the smaller side the factors are filled with zeros.
        oversampling (`int`, *optional*): Further columns of the sketch; as many as `rank` by default, and at least 8.
        power_steps (`int`, *optional*, defaults to `3`): Subspace iterations.
        seed (`int`, *optional*, defaults to `0`): Decides the sketch; random states of the caller are left alone.
    """
    matrix = _wide(matrix)
    smaller = min(matrix.shape)
    kept = min(rank, smaller)
    width = kept + (max(kept, 8) if oversampling is None else oversampling)
    if smaller <= EXACT_BELOW or 2 * width > smaller:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _range(matrix, width, power_steps, seed)
        left, values, right = _small_svd(matrix.T @ basis)
        # basis.T @ matrix = right @ diag(values) @ left.T
        left, right = basis @ right.T, left.T
    root = values[:kept].sqrt()
    return pad(left[:, :kept] * root, root[:, None] * right[:kept], rank)


def compress(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of rank `rank` nearest to `B @ A`, by a decomposition of `k x k`; `(o, i)` is never formed."""
    left, right, core = _core(b, a)
    u, values, v = torch.linalg.svd(core)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    new_b, new_a = left @ (u[:, :kept] * root).to(left), (root[:, None] * v[:kept]).to(right) @ right.T
    return pad(new_b, new_a, rank)


def pad(b: torch.Tensor, a: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with factors of rank `rank`, filled up with zeros."""
    missing = rank - a.shape[0]
    if missing <= 0:
        return b.contiguous(), a.contiguous()
    return torch.cat([b, b.new_zeros(b.shape[0], missing)], 1), torch.cat([a, a.new_zeros(missing, a.shape[1])])


def norms_of_product(b: torch.Tensor, a: torch.Tensor) -> tuple[float, float]:
    """Frobenius and spectral norm of `B @ A`, from a matrix of `k x k`."""
    values = torch.linalg.svdvals(_core(b, a)[2])
    return float(values.norm()), float(values.max()) if len(values) else 0.0


def error_of_product(
    b: torch.Tensor, a: torch.Tensor, new_b: torch.Tensor, new_a: torch.Tensor
) -> tuple[float, float]:
    """`||B A - B' A'|| / ||B A||` in the Frobenius and the spectral norm; 0 where both are zero."""
    wide = torch.promote_types(b.dtype, new_b.dtype)
    difference = norms_of_product(torch.cat([b.to(wide), -new_b.to(wide)], 1), torch.cat([a.to(wide), new_a.to(wide)]))
    whole = norms_of_product(b, a)
    return _ratio(difference[0], whole[0]), _ratio(difference[1], whole[1])


def error_of_factors(matrix: torch.Tensor, b: torch.Tensor, a: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """`||M - B A|| / ||M||` in the Frobenius and the spectral norm; 0 where both are zero.

    The Frobenius norm is exact, by blocks of rows. The spectral norms of larger matrices are estimates from below, by
    subspace iteration.
    """
    matrix = _wide(matrix)
    b, a = b.to(matrix), a.to(matrix)
    rows = max(1, 2**22 // max(1, matrix.shape[1]))
    pairs = zip(matrix.split(rows), b.split(rows))
    squares = sum(float((part - left @ a).double().square().sum()) for part, left in pairs)
    whole = float(sum(part.double().square().sum() for part in matrix.split(rows)))
    if min(matrix.shape) <= EXACT_BELOW:
        residual, spectral = (float(torch.linalg.matrix_norm(part, 2)) for part in (matrix - b @ a, matrix))
    else:
        residual, spectral = _spectral_norm(matrix, b, a, seed), _spectral_norm(matrix, b[:, :0], a[:0], seed)
    return _ratio(squares**0.5, whole**0.5), _ratio(residual, spectral)


def _range(matrix: torch.Tensor, width: int, power_steps: int, seed: int) -> torch.Tensor:
    """Orthonormal columns `(o, width)` that nearly hold the leading left singular vectors."""
    # Drawn on the CPU, so that every device sketches alike.
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float64).to(matrix)
    basis = torch.linalg.qr(matrix @ sketch)[0]
    for _ in range(power_steps):
        basis = torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis


def _small_svd(tall: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SVD of a tall matrix by QR and a small decomposition in float64."""
    basis, core = torch.linalg.qr(tall)
    u, values, v = torch.linalg.svd(core.double())
    return basis @ u.to(basis), values.to(basis), v.to(basis)


def _core(b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal `L`, `R` and a small float64 `M` with `B @ A = L @ M @ R.T`."""
    left, upper = torch.linalg.qr(_wide(b))
    right, lower = torch.linalg.qr(_wide(a).T)
    return left, right, upper.double() @ lower.double().T


def _spectral_norm(matrix: torch.Tensor, b: torch.Tensor, a: torch.Tensor, seed: int) -> float:
    """Largest singular value of `M - B A`, nearly."""
    generator = torch.Generator().manual_seed(seed)
    # Rows and not columns: few of those are slow to multiply with.
    rows = torch.randn(_SPECTRAL_WIDTH, matrix.shape[0], generator=generator, dtype=torch.float64).to(matrix)
    for _ in range(_SPECTRAL_STEPS):
        rows = torch.linalg.qr(rows.T)[0].T
        rows = torch.linalg.qr((rows @ matrix - (rows @ b) @ a).T)[0].T
        rows = rows @ matrix.T - (rows @ a.T) @ b.T
    return float(torch.linalg.matrix_norm(rows.double(), 2))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float(part > 0)
