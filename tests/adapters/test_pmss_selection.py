"""Selection of skeletons against LAPACK, against the definition in float64, and its cache."""

import numpy as np
import pytest
import torch

from hf_delta.adapters.pmss import cache
from hf_delta.adapters.pmss.selection import SELECTIONS, greedy_pivots, select_skeleton


def matrix(kind, rows, columns, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    size = min(rows, columns)
    if kind == "flat":
        weight = normal(rows, columns)
    elif kind == "outliers":
        weight = normal(rows, columns) * normal(columns).exp() * normal(rows, 1).exp()
    else:
        spectrum = {"power": torch.arange(1, size + 1.0) ** -0.8, "decay": 0.8 ** torch.arange(size)}[kind]
        weight = (normal(rows, size) * spectrum) @ normal(size, columns)
    return weight.to(dtype)


def pivots_by_definition(items, k):
    """The item farthest from the span of those chosen, `k` times, with distances by least squares in float64."""
    items = items.double().numpy()
    chosen = []
    for _ in range(k):
        distances = np.linalg.norm(items, axis=1)
        if chosen:
            span = items[chosen].T
            solution = np.linalg.lstsq(span, items.T, rcond=None)[0]
            distances = np.linalg.norm(items.T - span @ solution, axis=0)
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
    return chosen


@pytest.mark.parametrize("kind", ["flat", "outliers", "power", "decay"])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)])
def test_pivots_are_those_of_the_definition(kind, shape):
    weight = matrix(kind, *shape)
    rows, columns = select_skeleton(weight, 20)
    assert rows.tolist() == pivots_by_definition(weight, 20)
    assert columns.tolist() == pivots_by_definition(weight.T, 20)


@pytest.mark.parametrize("kind", ["flat", "outliers", "power", "decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pivots_are_those_of_lapack_in_order(kind, dtype):
    """Sizes that take many rounds of candidates; single precision only while residuals are far above its noise."""
    lapack = pytest.importorskip("scipy.linalg").lapack
    weight = matrix(kind, 330, 400, dtype)
    k = 40 if kind == "decay" and dtype == torch.float32 else 90
    rows, columns = select_skeleton(weight, k)
    assert rows.tolist() == (lapack.dgeqp3(weight.double().T.numpy())[1][:k] - 1).tolist()
    assert columns.tolist() == (lapack.dgeqp3(weight.double().numpy())[1][:k] - 1).tolist()


def test_many_rounds_in_single_precision_follow_double_precision():
    """Norms fall by four orders of magnitude: without computing them afresh, single precision would lose them."""
    weight = matrix("decay", 300, 260)
    single = greedy_pivots(weight.float(), 40)
    assert single.tolist() == greedy_pivots(weight, 40).tolist() == pivots_by_definition(weight, 40)


def test_of_equal_items_the_first_is_chosen():
    assert greedy_pivots(torch.eye(300), 200).tolist() == list(range(200))
    repeated = torch.cat([torch.ones(150, 4), 2 * torch.ones(150, 4), torch.eye(4)])
    assert greedy_pivots(repeated, 4).tolist() == [150, 300, 301, 302]
    # Equal only after the first choice is taken out of them.
    assert greedy_pivots(torch.tensor([[0.0, 4, 0], [3, 0, 4], [30, 0, 0]]), 3).tolist() == [2, 0, 1]


@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("method", SELECTIONS)
def test_a_weight_of_low_rank_gives_distinct_indices(method, rank):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, rank, generator=generator) @ torch.randn(rank, 40, generator=generator)
    for indices, size in zip(select_skeleton(weight, 30, method), weight.shape):
        assert len(set(indices.tolist())) == 30 and 0 <= indices.min() and indices.max() < size


@pytest.mark.parametrize("method", SELECTIONS)
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_every_method_chooses_all_and_repeats_itself(method, shape):
    weight = matrix("power", *shape, torch.float32)
    state = torch.get_rng_state()
    rows, columns = select_skeleton(weight, 32, method)
    assert rows.dtype == columns.dtype == torch.int64 and len(set(rows.tolist())) == len(set(columns.tolist())) == 32
    again = select_skeleton(weight, 32, method)
    assert torch.equal(rows, again[0]) and torch.equal(columns, again[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", SELECTIONS)
def test_half_precision_is_computed_in_single_precision(method):
    weight = matrix("power", 100, 80).bfloat16()
    for half, single in zip(select_skeleton(weight, 20, method), select_skeleton(weight.float(), 20, method)):
        assert torch.equal(half, single)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(select_skeleton(weight, 20, method)[0], select_skeleton(weight.float(), 20, method)[0])


@pytest.mark.parametrize("method", ["sketched_qr", "leverage", "uniform"])
def test_the_seed_counts(method):
    weight = matrix("flat", 200, 150, torch.float32)
    first, second = (select_skeleton(weight, 20, method, seed)[0] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_norms_are_the_largest():
    weight = matrix("outliers", 90, 70)
    rows, columns = select_skeleton(weight, 10, "norm")
    assert rows.tolist() == np.argsort(-np.linalg.norm(weight.numpy(), axis=1))[:10].tolist()
    assert columns.tolist() == np.argsort(-np.linalg.norm(weight.numpy(), axis=0))[:10].tolist()


def test_leverage_is_that_of_the_leading_singular_vectors():
    """Of a weight of rank `k` the range finder finds them exactly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(90, 10, generator=generator).double() @ torch.randn(10, 70, generator=generator).double()
    left, _, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    rows, columns = select_skeleton(weight, 10, "leverage")
    assert rows.tolist() == np.argsort(-np.square(left[:, :10]).sum(1))[:10].tolist()
    assert columns.tolist() == np.argsort(-np.square(right[:10]).sum(0))[:10].tolist()


def test_uniform_prefers_nothing():
    weight = torch.zeros(20, 20)
    chosen = torch.cat([select_skeleton(weight, 5, "uniform", seed)[0] for seed in range(2000)])
    counts = torch.bincount(chosen, minlength=20)
    # 2000 draws with probability 1/4: six standard deviations.
    assert (counts - 500).abs().max() < 6 * (2000 * 0.25 * 0.75) ** 0.5


def test_how_well_skeletons_span_the_weight():
    """Best to worst: pivots, pivots of a sketch, any columns; by what is left of a weight outside their span."""
    weight = matrix("power", 300, 250)

    def left_over(method):
        total = 0.0
        for seed in range(3):
            basis = torch.linalg.qr(weight[:, select_skeleton(weight, 30, method, seed)[1]]).Q
            total += float((weight - basis @ (basis.T @ weight)).norm() / weight.norm()) / 3
        return total

    exact, sketched, any_columns = map(left_over, ("pivoted_qr", "sketched_qr", "uniform"))
    assert exact < any_columns and sketched < any_columns and sketched < 1.1 * exact


# -- cache ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Every selection is kept; the list gets a line for each that is made."""
    made = []

    def select(*args):
        made.append(args[1:])
        return select_skeleton(*args)

    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    monkeypatch.setattr(cache, "select_skeleton", select)
    return made, str(tmp_path / "deep" / "folder")


def test_a_selection_is_made_once(kept):
    made, folder = kept
    weight = matrix("power", 40, 30, torch.float32)
    expected = select_skeleton(weight, 8)
    for _ in range(2):
        found = cache.cached_selection(weight, 8, "pivoted_qr", 0, 16, folder)
        assert all(map(torch.equal, found, expected))
    assert len(made) == 1
    # The greedy selection has no use for a seed.
    cache.cached_selection(weight, 8, "pivoted_qr", 5, 16, folder)
    assert len(made) == 1
    cache.cached_selection(weight.T, 8, "pivoted_qr", 0, 16, folder)
    cache.cached_selection(weight, 9, "pivoted_qr", 0, 16, folder)
    cache.cached_selection(weight, 8, "sketched_qr", 0, 16, folder)
    cache.cached_selection(weight, 8, "sketched_qr", 1, 16, folder)
    cache.cached_selection(weight.bfloat16(), 8, "pivoted_qr", 0, 16, folder)
    changed = weight.clone()
    changed[3, 4] += 1e-6
    cache.cached_selection(changed, 8, "pivoted_qr", 0, 16, folder)
    assert len(made) == 7
    assert not [path for path in cache.Path(folder).iterdir() if path.suffix != ".safetensors"]


def test_small_weights_and_quick_methods_are_not_kept(tmp_path, monkeypatch):
    weight = matrix("power", 40, 30, torch.float32)
    cache.cached_selection(weight, 8, "pivoted_qr", 0, 16, str(tmp_path))
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    cache.cached_selection(weight, 8, "norm", 0, 16, str(tmp_path))
    cache.cached_selection(weight, 8, "pivoted_qr", 0, 16, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [b"", b"no tensors in here", None])
def test_broken_files_are_made_again(kept, broken, caplog):
    made, folder = kept
    weight = matrix("power", 40, 30, torch.float32)
    expected = cache.cached_selection(weight, 8, "pivoted_qr", 0, 16, folder)
    (path,) = cache.Path(folder).iterdir()
    if broken is None:
        cache.save_file({"rows": torch.arange(8), "columns": torch.arange(23, 31)}, path)
    else:
        path.write_bytes(broken)
    for _ in range(2):
        found = cache.cached_selection(weight, 8, "pivoted_qr", 0, 16, folder)
        assert all(map(torch.equal, found, expected))
    assert len(made) == 2 and len(caplog.records) == 1 and "made again" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(kept, tmp_path, caplog):
    made, _ = kept
    (tmp_path / "file").write_text("")
    weight = matrix("power", 40, 30, torch.float32)
    found = cache.cached_selection(weight, 8, "pivoted_qr", 0, 16, str(tmp_path / "file" / "folder"))
    assert all(map(torch.equal, found, select_skeleton(weight, 8)))
    assert "cannot be kept" in caplog.text
