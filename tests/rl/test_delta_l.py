"""The weights of Delta-L normalisation and the pipeline they go through, without a model."""

import pytest
import torch

from hf_delta.errors import InputError
from hf_delta.rl.weights import DeltaLWeights, RolloutBatch, combine_weights, delta_l_weights


def batch(lengths, groups=None, **fields):
    lengths = torch.tensor(lengths)
    n = len(lengths)
    base = {
        "group_ids": torch.zeros(n, dtype=torch.long) if groups is None else torch.tensor(groups),
        "lengths": lengths,
        "rewards": torch.zeros(n, 1),
        "reward": torch.zeros(n),
        "advantages": torch.zeros(n),
        "correct": torch.zeros(n, dtype=torch.bool),
    }
    return RolloutBatch(**{**base, **fields})


def test_weights_by_hand():
    # L^-1 = 1, 1/2, 1/4: mean 7/12, so the weights are 12/7, 6/7, 3/7.
    assert delta_l_weights(torch.tensor([1, 2, 4]), 1.0).tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_half_power_by_hand():
    assert delta_l_weights(torch.tensor([4, 16]), 0.5).tolist() == pytest.approx([4 / 3, 2 / 3])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.75, 1.0])
def test_mean_over_the_batch_is_one_and_empty_sequences_take_no_part(alpha):
    weights = delta_l_weights(torch.tensor([0, 3, 700, 41, 0, 9]), alpha)
    assert weights[[0, 4]].tolist() == [0.0, 0.0]
    assert weights[[1, 2, 3, 5]].mean().item() == pytest.approx(1.0)
    alone = delta_l_weights(torch.tensor([3, 700, 41, 9]), alpha)
    assert torch.equal(weights[[1, 2, 3, 5]], alone)


def test_alpha_zero_gives_exactly_one():
    assert torch.equal(delta_l_weights(torch.tensor([3, 700, 41, 9, 7]), 0.0), torch.ones(5, dtype=torch.float64))


def test_group_scope_is_the_batch_rule_group_by_group():
    lengths, groups = torch.tensor([5, 50, 500, 3, 0, 8]), torch.tensor([0, 0, 0, 1, 1, 1])
    weights = delta_l_weights(lengths, 0.75, groups)
    apart = torch.cat([delta_l_weights(lengths[:3], 0.75), delta_l_weights(lengths[3:], 0.75)])
    assert torch.allclose(weights, apart, rtol=0, atol=1e-15)
    assert not torch.allclose(weights, delta_l_weights(lengths, 0.75))


def test_a_group_without_tokens_gets_zero_and_not_nan():
    assert delta_l_weights(torch.tensor([0, 0, 4, 4]), 1.0, torch.tensor([0, 0, 1, 1])).tolist() == [0, 0, 1, 1]
    assert delta_l_weights(torch.tensor([0, 0]), 1.0).tolist() == [0, 0]


def test_variance_is_smallest_at_alpha_one_under_the_papers_assumption():
    """Var(g_i) = L_i: among weights with a given sum, sum w_i^2 L_i is least at w_i ~ 1 / L_i (Lagrange)."""
    lengths = torch.tensor([8, 20, 33, 120, 400])
    variance = {a: (delta_l_weights(lengths, a) ** 2 * lengths).sum().item() for a in (0.0, 0.5, 0.75, 1.0)}
    assert variance[1.0] == min(variance.values())
    least = len(lengths) ** 2 / (1 / lengths).sum().item()
    assert variance[1.0] == pytest.approx(least)


def test_weights_of_several_rules_multiply():
    double = lambda b: torch.full((len(b),), 2.0)  # noqa: E731
    weights = combine_weights([DeltaLWeights(alpha=1.0), double], batch([1, 2, 4]))
    assert weights.tolist() == pytest.approx([24 / 7, 12 / 7, 6 / 7])
    assert combine_weights([], batch([1, 2])).tolist() == [1, 1]


def negative(b):
    return torch.tensor([1.0, -1.0, 1.0])


def not_a_number(b):
    return torch.tensor([1.0, float("nan"), 1.0])


def too_short(b):
    return torch.ones(2)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (negative, "weight -1.0 for sequence 1"),
        (not_a_number, "weight nan for sequence 1"),
        (too_short, r"shape \(2,\)"),
    ],
)
def test_a_bad_rule_is_named(rule, message):
    with pytest.raises(InputError, match=message) as error:
        combine_weights([rule], batch([1, 2, 3]))
    assert rule.__name__ in str(error.value)
