"""Row norms of a weight with a low-rank change, against float64 and dense sums."""

import pytest
import torch

from hf_delta.ops import norms


def factors(o=37, i=53, r=5, dtype=torch.float32, spread=0.1):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(o, i, generator=generator).to(dtype)
    a, b = torch.randn(r, i, generator=generator).to(dtype), spread * torch.randn(o, r, generator=generator).to(dtype)
    return weight, a, b


def factored(weight, a, b, scaling):
    return norms.factored_row_norms(norms.row_square_norms(weight), norms.times_transposed(weight, a), a, b, scaling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scaling", [0.0, 0.5, -2.0])
def test_factored_norms_are_those_of_the_dense_sum(dtype, scaling):
    weight, a, b = factors(dtype=dtype)
    truth = torch.linalg.vector_norm(weight.double() + scaling * (b.double() @ a.double()), dim=1)
    norm = factored(weight, a, b, scaling)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norm.double(), truth, rtol=1e-12 if dtype == torch.float64 else 2e-6, atol=0)


def test_a_norm_taken_in_16_bits_would_be_a_thousand_times_worse():
    weight, a, b = factors(dtype=torch.bfloat16, spread=1.0)
    truth = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)
    in_16_bits = (weight.square().sum(1) + 2 * ((weight @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)).sqrt()
    error = lambda norm: ((norm.double() - truth).abs() / truth).max().item()  # noqa: E731
    assert error(in_16_bits) > 1000 * error(factored(weight, a, b, 1.0))


def test_adapters_wider_than_the_weight_are_not_rounded():
    weight, a, b = factors(dtype=torch.bfloat16)
    a, b = a.float() + 1e-4, b.float() + 1e-4
    truth = torch.linalg.vector_norm(weight.double() + b.double() @ a.double(), dim=1)
    torch.testing.assert_close(factored(weight, a, b, 1.0).double(), truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_chunks_do_not_change_the_result(monkeypatch, chunk):
    weight, a, b = factors(dtype=torch.bfloat16)
    monkeypatch.setattr(norms, "CHUNK_ELEMENTS", chunk)
    torch.testing.assert_close(norms.row_square_norms(weight), weight.float().square().sum(1))
    torch.testing.assert_close(norms.times_transposed(weight, a), weight.float() @ a.float().T)


def test_strides_do_not_matter():
    weight, a, b = factors()
    turned = weight.T.contiguous().T
    torch.testing.assert_close(factored(turned, a, b, 0.5), factored(weight, a, b, 0.5))


def test_a_change_that_cancels_a_row_leaves_rounding_and_no_nan():
    weight, _, _ = factors(o=4, i=6, r=6)
    norm = factored(weight, torch.eye(6), -weight, 1.0)
    assert (norm < 2e-3 * weight.norm(dim=1)).all()
