"""Losses over lists against loops over their formulas, DPO's losses at K = 2, and what must not change them."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from hf_delta.preference.lists import LIST_LOSSES, into_lists, lipo_lambda, plackett_luce


LAMBDA_OF_PAIRS = 1 / math.log(2) - 1 / math.log(3)
every_loss = pytest.mark.parametrize("name", LIST_LOSSES)


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def ranks(scores, labels):
    """1 for the highest score; among equals the better label first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], -labels[i]))
    return [order.index(i) + 1 for i in range(len(scores))]


def pairs(labels):
    return [(i, j) for i in range(len(labels)) for j in range(len(labels)) if labels[i] > labels[j]]


def by_hand(name, s, psi):
    """The loss of one list, its scores and labels given as lists of floats."""
    if name == "list_logistic":
        return sum(softplus(s[j] - s[i]) for i, j in pairs(psi))
    if name == "list_hinge":
        return sum(max(0.0, 1 - (s[i] - s[j])) for i, j in pairs(psi))
    if name == "lipo_lambda":
        tau = ranks(s, psi)
        return sum(
            abs(2 ** psi[i] - 2 ** psi[j])
            * abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
            * softplus(s[j] - s[i])
            for i, j in pairs(psi)
        )
    if name == "list_softmax":
        if not pairs(psi):
            return 0.0
        log_z = math.log(sum(map(math.exp, s)))
        return -sum(psi_i / sum(psi) * (s_i - log_z) for psi_i, s_i in zip(psi, s))
    # Plackett-Luce: at each place, the softmax among whoever is left.
    order = sorted(range(len(s)), key=lambda i: -psi[i])
    rivals = [[j for j in order if psi[j] < psi[i]] for i in order]
    return -sum(s[i] - math.log(math.exp(s[i]) + sum(math.exp(s[j]) for j in js)) for i, js in zip(order, rivals))


def lists(k, size=6, seed=0, tied=False):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(size, k, generator=generator, dtype=torch.float64)
    labels = torch.rand(size, k, generator=generator, dtype=torch.float64)
    return scores, (4 * labels).round() / 4 if tied else labels


@every_loss
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [2, 3, 8])
def test_against_loops(name, k, tied):
    scores, labels = lists(k, size=20, tied=tied)
    expected = [float(by_hand(name, s, psi)) for s, psi in zip(scores.tolist(), labels.tolist())]
    torch.testing.assert_close(LIST_LOSSES[name](scores, labels).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_plackett_luce_without_ties_is_the_likelihood_of_the_ranking():
    scores, labels = lists(5)
    for s, psi, loss in zip(scores, labels, plackett_luce(scores, labels)):
        ordered = s[psi.argsort(descending=True)]
        likelihood = 1.0
        for place in range(5):
            likelihood *= torch.softmax(ordered[place:], 0)[0].item()
        assert loss.item() == pytest.approx(-math.log(likelihood), rel=1e-12)


@every_loss
@pytest.mark.parametrize("tied", [False, True])
def test_gradients(name, tied):
    scores, labels = lists(4, tied=tied)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]] * 2, dtype=torch.bool)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: LIST_LOSSES[name](s, labels, mask), scores)


@every_loss
def test_two_completions_are_dpo(name):
    """Up to 1 / log 2 - 1 / log 3 = 0.5325 for LiPO, with labels 1 and 0, whichever stands first."""
    chosen, rejected = lists(2, size=8)[0].unbind(1)
    margins = torch.cat([chosen - rejected, torch.tensor([0.0, 50.0, -50.0])])
    dpo = torch.relu(1 - margins) if name == "list_hinge" else -logsigmoid(margins)
    constant = LAMBDA_OF_PAIRS if name == "lipo_lambda" else 1.0
    assert round(LAMBDA_OF_PAIRS, 4) == 0.5325
    zeros, ones = torch.zeros_like(margins), torch.ones_like(margins)
    for first, second, labels in [(margins, zeros, (ones, zeros)), (zeros, margins, (zeros, ones))]:
        found = LIST_LOSSES[name](torch.stack([first, second], 1), torch.stack(labels, 1))
        torch.testing.assert_close(found, constant * dpo, rtol=1e-12, atol=1e-12)


@every_loss
def test_order_in_a_list_does_not_matter(name):
    """Neither to losses nor to gradients, also where scores, labels or both are equal."""
    scores, labels = lists(6, size=30, tied=True)
    scores[10:] = scores[10:].round()
    scores[20:] = 0.0
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(30)])
    gradients = []
    for move in (lambda x: x, lambda x: x.gather(1, order)):
        leaf = move(scores).clone().requires_grad_()
        losses = LIST_LOSSES[name](leaf, move(labels))
        losses.sum().backward()
        gradients.append((losses.detach(), leaf.grad))
    (losses, gradient), (moved_losses, moved_gradient) = gradients
    torch.testing.assert_close(moved_losses, losses, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved_gradient, gradient.gather(1, order), rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("padding", [0.0, math.nan, math.inf, -1e30])
def test_padding_changes_nothing(name, padding):
    """Lists of 2 to 5 in one batch, entries missing at the end and in between, against each list alone."""
    scores, labels = lists(5, size=4, tied=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)
    padded = scores.masked_fill(~mask, padding).requires_grad_()
    losses = LIST_LOSSES[name](padded, labels.masked_fill(~mask, padding), mask)
    losses.sum().backward()
    for row in range(4):
        alone = scores[row, mask[row]].unsqueeze(0).requires_grad_()
        loss = LIST_LOSSES[name](alone, labels[row, mask[row]].unsqueeze(0))
        loss.sum().backward()
        torch.testing.assert_close(losses[row], loss[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(padded.grad[row, mask[row]], alone.grad[0], rtol=1e-12, atol=1e-12)
    assert padded.grad[~mask].eq(0).all()


@every_loss
def test_lists_of_equal_labels_and_empty_ones_have_no_loss_and_no_gradient(name):
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.2, 0.9, 0.1], [0.3, 0.3, 0.9]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    losses = LIST_LOSSES[name](scores, labels, mask)
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0, 0] and scores.grad.eq(0).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes_do_not_overflow(name, dtype):
    """Far apart, in the right order and in the wrong one: the loss is linear in the worst margins, gradients at most K."""
    far = 3e4
    scores = torch.tensor([[far, 0.0, -far], [-far, 0.0, far], [far, far, far]], dtype=dtype).requires_grad_()
    labels = torch.tensor([[1.0, 0.5, 0.0]] * 3)
    losses = LIST_LOSSES[name](scores, labels)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and losses.isfinite().all() and scores.grad.isfinite().all()
    if name != "list_softmax":
        assert losses[0] == 0 and losses[1] > 0.1 * far
    assert scores.grad.dtype == dtype and scores.grad.abs().max() <= 3


@every_loss
def test_sixteen_bits_are_widened_before_differences_are_taken(name):
    scores, labels = (x.bfloat16() for x in lists(6))
    expected = [float(by_hand(name, s, psi)) for s, psi in zip(scores.tolist(), labels.tolist())]
    assert LIST_LOSSES[name](scores, labels).tolist() == pytest.approx(expected, rel=1e-5)


class TestLambdaWeights:
    def test_at_the_first_step(self):
        """All scores 0: ranked by label, so that pairs with the best weigh most and none is without a gradient."""
        scores = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([[0.0, 1.0, 0.5]])
        lipo_lambda(scores, labels).sum().backward()
        d1, d2, d3 = (1 / math.log(1 + tau) for tau in (1, 2, 3))
        best, middle, worst = 2.0, 2**0.5, 1.0
        w12, w13, w23 = (best - middle) * (d1 - d2), (best - worst) * (d1 - d3), (middle - worst) * (d2 - d3)
        expected = [[0.5 * (w13 + w23), -0.5 * (w12 + w13), 0.5 * (w12 - w23)]]
        torch.testing.assert_close(scores.grad, torch.tensor(expected, dtype=torch.float64))

    def test_they_have_no_gradient(self):
        """Between two ranks a small step changes no weight: the derivative is the weight times that of the pair's loss."""
        scores = torch.tensor([[2.0, -1.0]], dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([[1.0, 0.0]], requires_grad=True)
        lipo_lambda(scores, labels).sum().backward()
        assert scores.grad[0, 0].item() == pytest.approx(-LAMBDA_OF_PAIRS / (1 + math.exp(3)))
        assert labels.grad is None

    def test_equal_in_both_share_the_mean_discount(self):
        """Two of three equal in score and label: each weighs like the mean of ranks 2 and 3."""
        scores = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
        lipo_lambda(scores, torch.tensor([[1.0, 0.0, 0.0]])).sum().backward()
        weight = 1 / math.log(2) - (1 / math.log(3) + 1 / math.log(4)) / 2
        slope = weight / (1 + math.e)
        torch.testing.assert_close(scores.grad[0].tolist(), [-2 * slope, slope, slope])


@every_loss
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match=r"one shape \(B, K\), got \[\(4, 3\), \(3,\), None\]"):
        LIST_LOSSES[name](torch.zeros(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        LIST_LOSSES[name](torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="one shape"):
        LIST_LOSSES[name](torch.zeros(3), torch.zeros(3))


def test_into_lists():
    values = torch.arange(1.0, 6.0, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    found = into_lists(values, mask)
    assert found.tolist() == [[1, 2, 0], [3, 4, 5]]
    (found * torch.tensor([[1.0, 2, 9], [3, 4, 5]])).sum().backward()
    assert values.grad.tolist() == [1, 2, 3, 4, 5]
