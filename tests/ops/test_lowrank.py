"""Low-rank factors against the full decomposition in float64."""

import pytest
import torch

from hf_delta.ops.lowrank import (
    compress,
    error_of_factors,
    error_of_product,
    norms_of_product,
    pad,
    truncated_svd,
)


def noisy(rows, columns, dtype=torch.float32, seed=0):
    """Singular values that fall like `k ** -0.6` with noise on top: the hard case for a randomised method."""
    generator = torch.Generator().manual_seed(seed)
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, size, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, size, generator=generator, dtype=torch.float64))[0]
    matrix = left @ torch.diag(torch.arange(1, size + 1, dtype=torch.float64) ** -0.6) @ right.T
    return (matrix + 1e-3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def optimum(matrix, rank):
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (300, 700), (700, 300)])
@pytest.mark.parametrize("rank", [4, 16])
def test_the_truncation_is_as_good_as_the_best_one(shape, rank):
    matrix = noisy(*shape)
    b, a = truncated_svd(matrix, rank)
    assert b.shape == (shape[0], rank) and a.shape == (rank, shape[1])
    error = float((matrix.double() - b.double() @ a.double()).norm() / matrix.double().norm())
    assert optimum(matrix, rank) * (1 - 1e-6) <= error <= optimum(matrix, rank) * 1.002
    frobenius, spectral = error_of_factors(matrix, b, a)
    assert frobenius == pytest.approx(error, rel=1e-4)
    values = torch.linalg.svdvals(matrix.double())
    residual = torch.linalg.matrix_norm(matrix.double() - b.double() @ a.double(), 2)
    assert spectral == pytest.approx(float(residual / values[0]), rel=0.01)


def test_the_power_steps_are_what_makes_it_good():
    matrix = noisy(600, 500)
    without = error_of_factors(matrix, *truncated_svd(matrix, 8, power_steps=0))[0]
    assert without > 1.02 * optimum(matrix, 8) > error_of_factors(matrix, *truncated_svd(matrix, 8))[0]


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_state():
    matrix = noisy(400, 300)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (truncated_svd(matrix, 8, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("shape", [(40, 30), (600, 400)])
def test_a_matrix_of_exactly_that_rank_is_kept(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape[0], 6, generator=generator) @ torch.randn(6, shape[1], generator=generator)
    for rank in (6, 16):
        b, a = truncated_svd(matrix, rank)
        assert (b @ a - matrix).abs().max() < 1e-4
        assert error_of_factors(matrix, b, a)[0] < 2e-6


def test_ranks_above_the_matrix_are_filled_with_zeros():
    matrix = noisy(12, 9)
    b, a = truncated_svd(matrix, 16)
    assert b.shape == (12, 16) and a.shape == (16, 9)
    assert not b[:, 9:].any() and not a[9:].any()
    assert torch.allclose(b @ a, matrix, atol=1e-6)
    assert all(torch.equal(left, right) for left, right in zip(pad(b, a, 8), (b, a)))


def test_a_zero_matrix_has_no_error():
    b, a = truncated_svd(torch.zeros(300, 280), 4)
    assert not (b @ a).any()
    assert error_of_factors(torch.zeros(300, 280), b, a) == (0.0, 0.0)
    assert error_of_product(torch.zeros(9, 2), torch.zeros(2, 7), torch.zeros(9, 1), torch.zeros(1, 7)) == (0.0, 0.0)


def test_all_of_a_change_that_should_be_zero_is_error():
    one = torch.ones(9, 1), torch.ones(1, 7)
    assert error_of_product(torch.zeros(9, 2), torch.zeros(2, 7), *one) == (1.0, 1.0)
    assert error_of_factors(torch.zeros(9, 7), *one) == (1.0, 1.0)


def test_the_spectral_norm_of_what_factors_have_that_a_large_matrix_has_not():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 40, generator=generator))[0] for n in (300, 280))
    values = torch.tensor([100.0] * 20 + [1.0] * 10 + [0.0] * 10)
    b, a = left * values, right.T
    # One direction of the factors is not in the matrix, and is the largest of the difference.
    b[:, 35] = 2 * left[:, 35]
    assert error_of_factors((left * values) @ right.T, b, a)[1] == pytest.approx(0.02, rel=1e-3)


def test_half_precision_is_computed_in_single():
    matrix = noisy(300, 280, torch.bfloat16)
    b, a = truncated_svd(matrix, 8)
    assert b.dtype == a.dtype == torch.float32
    assert error_of_factors(matrix, b, a)[0] < optimum(matrix, 8) * 1.002


def factors(rows=90, columns=70, k=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, k + 1, dtype=torch.float64) ** -1.0
    b = torch.randn(rows, k, generator=generator, dtype=torch.float64) * decay
    return b, torch.randn(k, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 5, 20, 33])
def test_compressing_factors_is_the_truncation_of_their_product(rank):
    b, a = factors()
    new_b, new_a = compress(b, a, rank)
    assert new_b.shape == (90, rank) and new_a.shape == (rank, 70)
    left, values, right = torch.linalg.svd(b @ a, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    assert torch.allclose(new_b @ new_a, best, atol=1e-10)
    frobenius, spectral = error_of_product(b, a, new_b, new_a)
    rest = values[rank:]
    assert frobenius == pytest.approx(float(rest.norm() / values.norm()), abs=1e-12)
    assert spectral == pytest.approx(float(rest[:1].sum() / values[0]), abs=1e-12)


def test_more_columns_than_the_matrix_has_can_be_compressed():
    b, a = factors(rows=8, columns=6, k=20)
    new_b, new_a = compress(b, a, 6)
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-10)


def test_norms_of_a_product():
    b, a = factors()
    found = norms_of_product(b, a)
    assert found[0] == pytest.approx(float((b @ a).norm())) and found[1] == pytest.approx(
        float(torch.linalg.matrix_norm(b @ a, 2))
    )


def test_compressing_never_makes_the_whole_matrix():
    """Eight thousand squared in float32 would be 256 MB; the largest tensor made is one factor."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    b, a = torch.randn(8000, 12), torch.randn(12, 8000)
    with Watch():
        new_b, new_a = compress(b, a, 4)
        error_of_product(b, a, new_b, new_a)
    assert largest <= 16 * 8000
