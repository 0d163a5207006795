"""Statistics of the next-token distribution, against full logits in float64 and against TRL's kernel."""

import pytest
import torch
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

from hf_delta._compat.kernels import trl_logps_and_kl
from hf_delta.ops.token_kl import TokenScores, masked_token_scores, token_logps_and_kl
from tests.ops.test_token_kl import CASES, TILE, WIDTH, Largest, V, inputs, tiled
from tests.test_docs import ROOT, code_blocks


STATISTICS = TokenScores._fields[3:]


def from_logits(z, targets):
    """The definitions, from logits `(N, V)` that the temperature has divided."""
    logps = z.log_softmax(-1)
    return {
        "entropy": -(logps.exp() * logps).sum(-1),
        "log_sum_sq_probs": logps.exp().square().sum(-1).log(),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
    }


def logits(hidden, head_weight, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, **_):
    z = hidden.double() @ head_weight.double().T
    z = logit_scale * (z if bias is None else z + bias.double())
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def likely_targets(targets, leaves, settings):
    """Every other target is the most likely token: at random, none would be."""
    best = logits(**leaves, **settings).argmax(-1)
    return torch.where(torch.arange(len(targets)) % 2 == 0, best, targets)


def check(found, truth, **tolerance):
    for name, wanted in truth.items():
        torch.testing.assert_close(getattr(found, name), wanted, **tolerance)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("reference", [False, True], ids=["alone", "with a reference"])
@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_full_logits(case, reference, trained):
    leaves, targets, settings = inputs(case, trained)
    targets = likely_targets(targets, leaves, settings)
    if not reference:
        settings = {name: value for name, value in settings.items() if not name.startswith("ref_")}
    found = tiled(targets, **leaves, **settings, statistics=True)
    truth = from_logits(logits(**leaves, **settings), targets)
    assert truth["is_top1"].any() and not truth["is_top1"].all()
    check(found, truth, rtol=1e-12, atol=1e-12)
    assert not any(getattr(found, name).requires_grad for name in STATISTICS)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("case", ["plain", "everything"])
def test_scores_and_gradients_are_the_same_with_statistics(case, trained):
    found = []
    for statistics in (False, True):
        leaves, targets, settings = inputs(case, trained)
        scores = tiled(targets, **leaves, **settings, statistics=statistics)
        (scores.logps.sum() + scores.kl.square().sum()).backward()
        found.append([*scores[:3], *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)])
        assert all((each is None) != statistics for each in scores[3:])
    assert all(torch.equal(a, b) for a, b in zip(*found))


SETTINGS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, 900)},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.4},
    "temperature": {"temperature": 1.7},
    "everything": {"bias": torch.linspace(-1, 1, 900), "softcap": 3.0, "logit_scale": 0.4, "temperature": 0.6},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_trl(case, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(24, 32).to(dtype), (0.5 * torch.randn(900, 32)).to(dtype)
    settings = SETTINGS[case] | ({"bias": SETTINGS[case]["bias"].to(dtype)} if "bias" in SETTINGS[case] else {})
    targets = likely_targets(torch.randint(900, (24,)), {"hidden": hidden, "head_weight": weight}, settings)
    ours, theirs = (
        compute(hidden, weight, targets, statistics=True, **settings)
        for compute in (token_logps_and_kl, trl_logps_and_kl)
    )
    truth = from_logits(logits(hidden, weight, **settings), targets)
    assert truth["is_top1"].any() and not truth["is_top1"].all()
    check(ours, {name: wanted.to(getattr(ours, name).dtype) for name, wanted in truth.items()}, rtol=1e-5, atol=1e-5)
    # TRL rounds logits to the dtype of the hidden states, which could also turn a near tie; the seed has none.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    check(ours, {name: getattr(theirs, name) for name in ("logps", *STATISTICS)}, **tolerance)


def test_names_and_order_are_those_of_trl():
    assert OPTIONAL_OUTPUTS == STATISTICS


def test_trl_statistics_have_no_gradient_here():
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    found = trl_logps_and_kl(hidden, torch.randn(V, WIDTH), torch.arange(4), ref_hidden=hidden, statistics=True)
    assert not any(getattr(found, name).requires_grad for name in STATISTICS)
    assert found.logps.requires_grad and found.kl.requires_grad


@pytest.mark.parametrize("compute", [token_logps_and_kl, trl_logps_and_kl], ids=lambda f: f.__name__)
def test_only_the_first_of_equal_logits_is_top1(compute):
    weight = torch.zeros(12, 1)
    # Equal in one block of the vocabulary, and in two.
    weight[[2, 4, 7]] = 1.0
    tile = {"rows": 2, "columns": 5} if compute is token_logps_and_kl else {}
    found = compute(torch.ones(5, 1), weight, torch.tensor([2, 4, 7, 0, 11]), statistics=True, **tile)
    assert found.is_top1.tolist() == [True, False, False, False, False]


def test_entropy_of_distributions_that_are_flat_and_that_are_certain():
    """In float32, at logits whose squares would drown the entropy if it were the difference of two large sums."""
    hidden = torch.tensor([[0.0], [3e4]])
    found = token_logps_and_kl(
        hidden, torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([0, 0]), statistics=True, columns=1
    )
    torch.testing.assert_close(found.entropy, torch.tensor([3.0, 2.0]).log(), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.log_sum_sq_probs, -torch.tensor([3.0, 2.0]).log(), rtol=1e-6, atol=1e-6)


def test_order_of_the_vocabulary_does_not_matter():
    """Peaks that rise block by block, and far, shrink what was summed before them."""
    hidden, weight = torch.tensor([[1.0]]), torch.linspace(-100, 100, 41)[:, None]
    rising, falling = (
        token_logps_and_kl(hidden, w, torch.tensor([0]), statistics=True, columns=3) for w in (weight, weight.flip(0))
    )
    truth = from_logits(logits(hidden, weight), torch.tensor([0]))
    for found in (rising, falling):
        torch.testing.assert_close(found.entropy.double(), truth["entropy"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.log_sum_sq_probs.double(), truth["log_sum_sq_probs"], rtol=1e-5, atol=1e-6)


def test_masked_statistics_are_zero_and_false():
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 6, WIDTH, requires_grad=True), torch.randn(V, WIDTH)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]).bool()
    z = logits(hidden.detach(), weight)
    targets = z.argmax(-1)
    targets[0, 3] = (targets[0, 3] + 1) % V
    found = masked_token_scores(hidden, weight, targets, mask, statistics=True, **TILE)
    truth = from_logits(z[mask], targets[mask])
    for name, wanted in truth.items():
        ours = getattr(found, name)
        assert ours.shape == (2, 6) and not ours[~mask].any() and not ours.requires_grad
        torch.testing.assert_close(ours[mask], wanted.to(ours.dtype), rtol=1e-5, atol=1e-5)
    assert found.is_top1.dtype == torch.bool and found.is_top1.sum() == 4


def test_no_rows():
    found = token_logps_and_kl(torch.zeros(0, WIDTH), torch.randn(V, WIDTH), torch.arange(0), statistics=True)
    assert all(getattr(found, name).shape == (0,) for name in STATISTICS)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nothing_as_large_as_the_logits_is_allocated(softcap):
    hidden, weight = torch.randn(256, 8, requires_grad=True), torch.randn(4096, 8)
    with Largest() as largest:
        token_logps_and_kl(
            hidden, weight, torch.arange(256), softcap=softcap, statistics=True, rows=32, columns=512
        ).logps.sum().backward()
    assert 32 * 512 <= largest.elements <= weight.numel()


def test_the_example_of_the_documentation_works():
    scope = {}
    exec(code_blocks(ROOT / "docs/preference/token_kl.md", "python")[0], scope)
    scores, mask = scope["scores"], scope["mask"] == 1
    assert scores.kl.shape == (2, 6) and scores.kl[~mask].eq(0).all() and scores.kl[mask].gt(0).all()
    assert scope["hidden"].grad[mask].ne(0).any(-1).all() and 0 <= scope["accuracy"] <= 1
