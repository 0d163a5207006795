"""Losses of pairs against loops, against TRL's formulas written out, and in their limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hf_delta.preference.losses import PAIR_LOSSES, completion_scores
from hf_delta.preference.weights import TokenTerms


LENGTHS = {
    "chosen_lengths": torch.tensor([3, 1, 7, 2, 5, 4]),
    "rejected_lengths": torch.tensor([2, 6, 1, 4, 4, 9]),
}
OPTIONS = {"ipo": LENGTHS, "sigmoid_norm": LENGTHS, "robust": {"label_smoothing": 0.15}}


def pairs(dtype=torch.float32, seed=0, scale=5.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, 6, generator=generator, dtype=dtype)).unbind()


def completions(n=4, t=9, dtype=torch.float32, seed=0):
    """Log-probabilities with exact zeros outside of a ragged mask, as slices of something longer, as TRL has them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    mask = torch.arange(t) < lengths[:, None]
    draws = torch.randn(3, n, t + 3, generator=generator, dtype=dtype)
    logps, ref_logps = (-draws[i].abs()[:, -t:].masked_fill(~mask, 0.0) for i in (0, 1))
    return logps, ref_logps, draws[2].abs()[:, -t:].masked_fill(~mask, 0.0), mask


def trl(loss_type, c, r, beta, chosen_lengths=None, rejected_lengths=None, label_smoothing=0.0):
    """TRL's DPOTrainer, formula by formula, in its order of operations."""
    delta_score = c - r
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * delta_score)
    if loss_type == "hinge":
        return torch.relu(1 - beta * delta_score)
    if loss_type == "robust":
        clean_loss_term = -(1 - label_smoothing) * F.logsigmoid(beta * delta_score)
        flipped_loss_term = -label_smoothing * F.logsigmoid(-beta * delta_score)
        return (clean_loss_term - flipped_loss_term) / (1 - 2 * label_smoothing)
    average = c / chosen_lengths.clamp(min=1.0) - r / rejected_lengths.clamp(min=1.0)
    return (average - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else -F.logsigmoid(beta * average)


def looped(loss_type, c, r, beta, lc, lr, smoothing):
    """The formulas of the papers in Python's floats."""
    softplus = lambda x: math.log1p(math.exp(-abs(x))) + max(x, 0.0)  # noqa: E731
    if loss_type == "hinge":
        return max(0.0, 1 - beta * (c - r))
    if loss_type == "ipo":
        return (c / lc - r / lr - 0.5 / beta) ** 2
    if loss_type == "sigmoid_norm":
        return softplus(-beta * (c / lc - r / lr))
    if loss_type == "robust":
        return ((1 - smoothing) * softplus(-beta * (c - r)) - smoothing * softplus(beta * (c - r))) / (
            1 - 2 * smoothing
        )
    return softplus(-beta * (c - r))


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_bit_for_bit_as_trl(loss_type):
    options = OPTIONS.get(loss_type, {})
    for seed in range(20):
        chosen, rejected = pairs(seed=seed)
        loss = PAIR_LOSSES[loss_type](chosen, rejected, 0.1, **options)
        assert torch.equal(loss, trl(loss_type, chosen, rejected, 0.1, **options))
        assert loss.shape == (6,)


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_against_loops(loss_type):
    chosen, rejected = pairs(torch.float64)
    loss = PAIR_LOSSES[loss_type](chosen, rejected, 0.7, **OPTIONS.get(loss_type, {}))
    lengths = [side.tolist() for side in LENGTHS.values()]
    expected = [
        looped(loss_type, *row, 0.7, *n, 0.15) for *row, n in zip(chosen.tolist(), rejected.tolist(), zip(*lengths))
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_gradients(loss_type):
    inputs = [side.requires_grad_() for side in pairs(torch.float64, scale=1.0)]
    assert gradcheck(lambda c, r: PAIR_LOSSES[loss_type](c, r, 0.3, **OPTIONS.get(loss_type, {})), inputs)


def test_robust_without_swaps_is_dpo():
    chosen, rejected = pairs(torch.float64)
    torch.testing.assert_close(
        PAIR_LOSSES["robust"](chosen, rejected, 0.1), PAIR_LOSSES["sigmoid"](chosen, rejected, 0.1)
    )


def test_weights_of_one_are_trls_sums_bit_for_bit():
    for seed in range(20):
        logps, ref_logps, _, mask = completions(n=6, t=37, seed=seed)
        scores = completion_scores(logps, ref_logps, None, TokenTerms(torch.ones_like(logps)), mask)
        assert torch.equal(scores, logps.sum(dim=1) - ref_logps.sum(dim=1))


def test_gradients_of_weights_of_one_are_trls_bit_for_bit():
    logps, ref_logps, _, mask = completions(n=6, t=37)
    ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    scores = completion_scores(ours, ref_logps, None, TokenTerms(torch.ones_like(logps)), mask)
    PAIR_LOSSES["sigmoid"](*scores.chunk(2), 0.1).mean().backward()
    chosen, rejected = (theirs.sum(dim=1) - ref_logps.sum(dim=1)).chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
    assert torch.equal(ours.grad[mask], theirs.grad[mask])
    assert not ours.grad[~mask].any()


@pytest.mark.parametrize("with_kl", [False, True])
def test_scores_against_loops(with_kl):
    logps, ref_logps, kl, mask = completions(dtype=torch.float64)
    weights = torch.rand(2, *logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    terms = TokenTerms(weights[0], weights[1] if with_kl else None)
    scores = completion_scores(logps, ref_logps, kl if with_kl else None, terms, mask)
    for i, score in enumerate(scores.tolist()):
        expected = 0.0
        for t in range(logps.shape[1]):
            if mask[i, t]:
                expected += float(weights[0, i, t] * (logps[i, t] - ref_logps[i, t]))
                expected += float(weights[1, i, t] * kl[i, t]) if with_kl else 0.0
        assert score == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("constant", [False, True])
def test_what_stands_outside_of_the_mask_changes_nothing(constant):
    logps, ref_logps, kl, mask = completions(dtype=torch.float64)
    weights = torch.rand(logps.shape, dtype=torch.float64)

    def run(garbage):
        inputs = [x.masked_fill(~mask, garbage).requires_grad_() for x in (logps, ref_logps, kl, weights, 2 * weights)]
        scores = completion_scores(*inputs[:3], TokenTerms(*inputs[3:]), mask, constant)
        PAIR_LOSSES["sigmoid"](*scores.chunk(2), 0.1).sum().backward()
        return scores.detach(), [x.grad for x in inputs]

    clean, gradients = run(0.0)
    for garbage in (math.nan, math.inf, -1e30):
        scores, others = run(garbage)
        assert torch.equal(scores, clean)
        for ours, theirs in zip(others, gradients, strict=True):
            assert torch.equal(ours, theirs)
            assert not ours[~mask].any()


def test_a_constant_chosen_kl_has_its_value_and_no_gradient():
    logps, ref_logps, kl, mask = completions(dtype=torch.float64)
    terms = TokenTerms(torch.ones_like(logps), torch.ones_like(logps))
    plain, constant = kl.clone().requires_grad_(), kl.clone().requires_grad_()
    first = completion_scores(logps, ref_logps, plain, terms, mask)
    second = completion_scores(logps, ref_logps, constant, terms, mask, constant_chosen_kl=True)
    assert torch.equal(first, second)
    first.sum().backward()
    second.sum().backward()
    assert not constant.grad[:2].any() and plain.grad[:2].any()
    assert torch.equal(constant.grad[2:], plain.grad[2:])


def test_score_gradients():
    logps, ref_logps, kl, mask = completions(n=2, t=4, dtype=torch.float64)
    weights = torch.rand(2, *logps.shape, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (logps, ref_logps, kl, *weights)]
    assert gradcheck(lambda a, b, k, w, v: completion_scores(a, b, k, TokenTerms(w, v), mask), inputs)


def test_no_weights_are_log_two():
    logps, ref_logps, kl, mask = completions()
    zeros = torch.zeros_like(logps)
    scores = completion_scores(logps, ref_logps, kl, TokenTerms(zeros, zeros), mask)
    torch.testing.assert_close(PAIR_LOSSES["sigmoid"](*scores.chunk(2), 0.1), torch.full((2,), math.log(2)))


def test_a_kl_term_without_kl_is_a_mistake_in_the_code():
    logps, ref_logps, _, mask = completions()
    with pytest.raises(ValueError, match="no KL was given"):
        completion_scores(logps, ref_logps, None, TokenTerms(logps, logps), mask)


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_a_completion_without_tokens_counts_as_one_with_a_score_of_zero(name):
    lengths = {"chosen_lengths": torch.tensor([0]), "rejected_lengths": torch.tensor([4])}
    found = PAIR_LOSSES[name](torch.zeros(1), torch.tensor([-2.0]), 0.5, **lengths)
    expected = {"ipo": (0.5 - 1) ** 2, "sigmoid_norm": math.log1p(math.exp(-0.25))}[name]
    assert found.item() == pytest.approx(expected)
