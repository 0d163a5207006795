"""Rules of token weights against loops in float64, and in their limits."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hf_delta.errors import InputError
from hf_delta.preference.losses import PAIR_LOSSES, completion_scores
from hf_delta.preference.weights import (
    TOKEN_WEIGHTS,
    ColumnWeights,
    SparsePOWeights,
    TokenBatch,
    TokenTerms,
    TokenWeights,
    checked_terms,
    contrast_weights,
)
from hf_delta.preference.weights.activations import KINDS


BETA = 0.3
PAIRS, TOKENS = 3, 7
sigmoid = PAIR_LOSSES["sigmoid"]


def batch_of(needs=frozenset(), seed=0, garbage=0.0, dtype=torch.float64):
    """Ragged completions that start at different places, with `garbage` wherever no completion is."""
    generator = torch.Generator().manual_seed(seed)
    n = 2 * PAIRS
    starts = torch.randint(0, 3, (n, 1), generator=generator)
    ends = starts + torch.randint(1, TOKENS - 2, (n, 1), generator=generator)
    mask = (torch.arange(TOKENS) >= starts) & (torch.arange(TOKENS) < ends)

    def draw(*shape, sign=1):
        return (sign * torch.rand(n, TOKENS, generator=generator, dtype=dtype)).masked_fill(~mask, garbage)

    fields = {
        "tokens": torch.randint(0, 9, (n, TOKENS), generator=generator),
        "mask": mask,
        "logps": draw(sign=-1),
        "ref_logps": draw(sign=-1),
        "kl": draw(),
        "columns": draw(),
        "activations": {kind: [draw(), draw()] for kind in KINDS},
        "masks": (draw(), draw()),
    }
    optional = {"kl", "columns", "activations", "masks"} - set(needs)
    if "hidden_states" in needs:
        optional -= {"masks"}
    return TokenBatch(**{key: value for key, value in fields.items() if key not in optional})


def expected_weights(name, batch):
    """Reward and KL weights of each rule, token by token."""
    n, t = batch.mask.shape
    reward = torch.zeros(n, t, dtype=torch.float64)
    kl = torch.zeros(n, t, dtype=torch.float64)
    for i in range(n):
        inside = [j for j in range(t) if batch.mask[i, j]]
        for position, j in enumerate(inside):
            if name in ("tdpo1", "tdpo2"):
                reward[i, j], kl[i, j] = 1.0, 1.0 if name == "tdpo1" else 0.5
            elif name == "d2po":
                reward[i, j] = 0.98**position
            elif name in ("columns", "tis_dpo"):
                reward[i, j] = batch.columns[i, j]
            elif name == "sparse_po":
                reward[i, j], kl[i, j] = batch.masks[0][i, j], batch.masks[1][i, j]
            else:
                total = 0.0
                for kind in KINDS:
                    for layer in batch.activations[kind]:
                        values = [float(layer[i, k]) for k in inside]
                        spread = max(values) - min(values)
                        total += (float(layer[i, j]) - min(values)) / spread / 2 if spread else 0.5
                reward[i, j] = kl[i, j] = total / len(KINDS)
    return reward, kl


def loss_of(rule, batch, logps=None, kl=None):
    logps, kl = batch.logps if logps is None else logps, batch.kl if kl is None else kl
    scores = completion_scores(logps, batch.ref_logps, kl, rule.weights(batch), batch.mask, rule.constant_chosen_kl)
    return sigmoid(*scores.chunk(2), BETA)


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_weights_and_losses_against_loops(name):
    rule = TOKEN_WEIGHTS[name]()
    for seed in range(5):
        batch = batch_of(rule.needs, seed)
        reward, kl = expected_weights(name, batch)
        terms = rule.weights(batch)
        torch.testing.assert_close(terms.reward[batch.mask], reward[batch.mask])
        assert (terms.kl is None) == ("kl" not in rule.needs)
        if terms.kl is not None:
            torch.testing.assert_close(terms.kl[batch.mask], kl[batch.mask])
        losses = loss_of(rule, batch)
        for i in range(PAIRS):
            score = [0.0, 0.0]
            for side, row in enumerate((i, PAIRS + i)):
                for t in range(TOKENS):
                    if batch.mask[row, t]:
                        score[side] += float(reward[row, t] * (batch.logps[row, t] - batch.ref_logps[row, t]))
                        score[side] += float(kl[row, t] * batch.kl[row, t]) if batch.kl is not None else 0.0
            assert float(losses[i]) == pytest.approx(math.log1p(math.exp(-BETA * (score[0] - score[1]))), rel=1e-12)


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_nothing_outside_of_the_completions_leaks(name):
    rule = TOKEN_WEIGHTS[name]()
    clean = loss_of(rule, batch_of(rule.needs))
    for garbage in (math.nan, math.inf, -1e9):
        batch = batch_of(rule.needs, garbage=garbage)
        assert torch.equal(loss_of(rule, batch), clean)
        checked_terms(rule.weights(batch), batch, name)


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_weights_have_the_dtype_of_the_log_probabilities(name):
    rule = TOKEN_WEIGHTS[name]()
    batch = batch_of(rule.needs, dtype=torch.float32)
    assert {term.dtype for term in rule.weights(batch) if term is not None} == {torch.float32}


def test_tdpo2_gradients_are_those_of_the_written_formula():
    rule, alpha = TOKEN_WEIGHTS["tdpo2"](alpha=0.7), 0.7
    batch = batch_of(rule.needs)
    ours = [x.clone().requires_grad_() for x in (batch.logps, batch.kl)]
    theirs = [x.clone().requires_grad_() for x in (batch.logps, batch.kl)]
    loss_of(rule, batch, *ours).sum().backward()
    m = batch.mask
    r_c, r_r = ((theirs[0] - batch.ref_logps) * m).sum(1).chunk(2)
    k_c, k_r = (theirs[1] * m).sum(1).chunk(2)
    (-F.logsigmoid(BETA * ((r_c - r_r) - alpha * (k_r - k_c.detach())))).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert not ours[1].grad[:PAIRS].any() and ours[1].grad[PAIRS:].any()


@pytest.mark.parametrize("name", TOKEN_WEIGHTS)
def test_gradients_reach_what_is_trained(name):
    rule = TOKEN_WEIGHTS[name]()
    batch = batch_of(rule.needs)
    inputs = [x.clone().requires_grad_() for x in (batch.logps, *(() if batch.kl is None else (batch.kl,)))]
    if name == "tdpo2":  # its gradient is not that of its value
        inputs[1] = inputs[1].detach()
    assert gradcheck(lambda logps, kl=None: loss_of(rule, batch, logps, kl), inputs)


def test_masks_of_one_are_tdpo1_and_without_kl_dpo():
    rule = SparsePOWeights()
    batch = batch_of(rule.needs)
    ones, zeros = torch.ones_like(batch.logps), torch.zeros_like(batch.logps)

    def masked(reward, kl):
        return loss_of(rule, TokenBatch(**{**vars(batch), "masks": (reward, kl)}))

    assert torch.equal(masked(ones, ones), loss_of(TOKEN_WEIGHTS["tdpo1"](), batch))
    chosen, rejected = ((batch.logps - batch.ref_logps) * batch.mask).sum(1).chunk(2)
    torch.testing.assert_close(masked(ones, zeros), sigmoid(chosen, rejected, BETA))
    torch.testing.assert_close(masked(zeros, zeros), torch.full((PAIRS,), math.log(2), dtype=torch.float64))
    assert torch.equal(loss_of(TOKEN_WEIGHTS["tdpo2"](alpha=1.0), batch), masked(ones, ones))
    assert torch.equal(loss_of(TOKEN_WEIGHTS["tdpo2"](alpha=0.0), batch), masked(ones, zeros))


def test_no_decay_is_dpo_bit_for_bit():
    batch = batch_of()
    assert torch.equal(loss_of(TOKEN_WEIGHTS["d2po"](gamma=1.0), batch), loss_of(TokenWeights(), batch))


def test_columns_with_kl_weigh_both_terms():
    rule = ColumnWeights(kl=True)
    batch = batch_of(rule.needs)
    terms = rule.weights(batch)
    assert rule.needs == {"columns", "kl"} and ColumnWeights().needs == {"columns"}
    assert torch.equal(terms.reward, batch.columns) and torch.equal(terms.kl, batch.columns)


def test_mapo_counts_one_where_there_is_nothing_to_compare():
    rule = TOKEN_WEIGHTS["mapo"](kinds=["mlp", "q"])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    flat, slope = torch.full((2, 3), 4.0), torch.tensor([[2.0, 9.0, 9.0], [0.0, 1.0, 2.0]])
    batch = SimpleNamespace(mask=mask, logps=torch.zeros(2, 3), activations={"mlp": [flat], "q": [slope, slope]})
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.75, 1.0]])
    torch.testing.assert_close(rule.weights(batch).reward, expected)
    assert torch.equal(*rule.weights(batch))


def test_penalty_is_l1_of_both_completions():
    batch = batch_of(SparsePOWeights.needs, garbage=math.nan)
    sums = [torch.where(batch.mask, mask, 0.0).sum(1) for mask in batch.masks]
    per_pair = [side[:PAIRS] + side[PAIRS:] for side in sums]
    for sharing, share in (("independent", 1.0), ("common", 0.5)):
        rule = SparsePOWeights(sharing=sharing, l1_reward=0.2, l1_kl=0.03)
        penalty = rule.penalty(TokenTerms(*batch.masks), batch.mask)
        torch.testing.assert_close(penalty, share * (0.2 * per_pair[0] + 0.03 * per_pair[1]))
    assert SparsePOWeights().penalty(TokenTerms(*batch.masks), batch.mask) is None


def test_contrast_weights_against_a_loop():
    positive, negative = -torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    for chosen in (True, False):
        linear = contrast_weights(positive, negative, chosen=chosen, low=-1.0, high=2.0, scale=(0.5, 1.5))
        exponential = contrast_weights(positive, negative, chosen=chosen, low=-1.0, high=2.0, scale=None)
        for i in range(4):
            for j in range(5):
                score = float(positive[i, j] - negative[i, j]) * (1 if chosen else -1)
                score = min(2.0, max(-1.0, score))
                assert float(linear[i, j]) == pytest.approx(0.5 + (score + 1.0) / 3.0)
                assert float(exponential[i, j]) == pytest.approx(math.exp(score))


def test_contrast_weights_favour_what_makes_a_completion_what_it_is():
    """A chosen token that the good model prefers, and a rejected one that the bad model does."""
    good, bad = torch.tensor([-1.0, -4.0]), torch.tensor([-4.0, -1.0])
    torch.testing.assert_close(contrast_weights(good, bad, chosen=True), torch.tensor([1.3, 0.7]))
    torch.testing.assert_close(contrast_weights(good, bad, chosen=False), torch.tensor([0.7, 1.3]))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"low": 1.5}, "low must be below high"),
        ({"low": math.nan}, "low must be below high"),
        ({"scale": (1.3, 0.7)}, "in order"),
        ({"scale": (-0.1, 0.7)}, "0 or more"),
        ({"negative_logps": torch.zeros(3)}, "both must score the same"),
    ],
)
def test_contrast_weights_refuse(change, match):
    arguments = {"positive_logps": torch.zeros(2), "negative_logps": torch.zeros(2), "chosen": True, **change}
    with pytest.raises(InputError, match=match):
        contrast_weights(**arguments)


@pytest.mark.parametrize(
    "name, arguments, match",
    [
        ("tdpo2", {"alpha": -0.1}, "tdpo2: alpha"),
        ("tdpo2", {"alpha": math.nan}, "tdpo2: alpha"),
        ("d2po", {"gamma": 0.0}, "d2po: gamma"),
        ("d2po", {"gamma": 1.01}, "d2po: gamma"),
        ("mapo", {"kinds": ["mlp", "logits"]}, "mapo: kinds"),
        ("mapo", {"kinds": []}, "mapo: kinds"),
        ("mapo", {"kinds": ["q", "q"]}, "mapo: kinds"),
        ("sparse_po", {"layers": "first"}, "sparse_po: layers takes all or last"),
        ("sparse_po", {"net": "deep"}, "sparse_po: net"),
        ("sparse_po", {"sharing": None}, "sparse_po: sharing"),
        ("sparse_po", {"dropout": 1.0}, "sparse_po: dropout"),
        ("sparse_po", {"l1_kl": -1.0}, "sparse_po: l1_kl"),
        ("sparse_po", {"l1_reward": math.inf}, "sparse_po: l1_reward"),
        ("sparse_po", {"weight_decay": math.nan}, "sparse_po: weight_decay"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, match):
    with pytest.raises(InputError, match=match):
        TOKEN_WEIGHTS[name](**arguments)
