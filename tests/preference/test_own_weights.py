"""Users' own rules of token weights: what they may give, and what is said of anything else."""

import math

import pytest
import torch

from hf_delta.errors import InputError
from hf_delta.preference.weights import (
    FunctionWeights,
    SparsePOWeights,
    TokenTerms,
    TokenWeights,
    checked_terms,
    terms_of,
    token_rule,
)
from tests.preference.test_weights import PAIRS, batch_of


def own(value, needs=None):
    def rule(batch):
        return value(batch) if callable(value) else value

    if needs is not None:
        rule.needs = needs
    return rule


def test_a_function_is_a_rule():
    batch = batch_of({"kl", "columns"})
    terms = token_rule(own(lambda b: (b.columns, b.kl), {"kl", "columns"})).weights(batch)
    assert torch.equal(terms.reward, batch.columns) and torch.equal(terms.kl, batch.kl)
    plain = token_rule(own(lambda b: b.tokens > 3))
    assert plain.needs == frozenset()
    weights = plain.weights(batch_of())
    assert weights.kl is None and weights.reward.dtype == torch.float64
    assert torch.equal(weights.reward, (batch.tokens > 3).double())
    rule = SparsePOWeights()
    assert token_rule(rule) is rule


@pytest.mark.parametrize(
    "value, needs, match",
    [
        (lambda b: torch.ones(3), (), r"reward weights are \(3,\) and must be \(N, T\), here \(6, 7\)"),
        (lambda b: None, (), "no tensor but NoneType"),
        (lambda b: [b.logps], (), "no tensor but list"),
        (lambda b: -torch.ones_like(b.logps), (), "reward weights are negative in the chosen completion of pair 0"),
        (lambda b: torch.full_like(b.logps, math.nan), (), "reward weights are not finite"),
        (lambda b: torch.full_like(b.logps, math.inf), (), "reward weights are not finite"),
        (lambda b: (-b.logps, b.logps), {"kl"}, "KL weights are negative"),
        (lambda b: -b.logps, {"kl"}, "needs 'kl' and gave no KL weights"),
        (lambda b: (-b.logps, -b.logps), (), "without 'kl' in what it needs"),
        (lambda b: (-b.logps,) * 3, {"kl"}, "must give weights or"),
    ],
)
def test_functions_that_give_something_else_are_refused_by_name(value, needs, match):
    with pytest.raises(InputError, match=match) as error:
        FunctionWeights(own(value, needs)).weights(batch_of(needs))
    assert "test_own_weights.own" in str(error.value)


def test_a_function_that_raises_is_named():
    with pytest.raises(InputError, match="token weights mine: it raised AttributeError: 'TokenBatch' object has no"):
        terms_of(token_rule(own(lambda b: b.surprise)), batch_of(), "mine")
    with pytest.raises(InputError, match="token weights tests.*own.*: the reward weights are"):
        terms_of(token_rule(own(torch.ones(3))), batch_of(), "mine")


def test_a_wrong_weight_is_found_where_it_is():
    batch = batch_of()
    weights = torch.ones_like(batch.logps)
    row, token = PAIRS + 1, int(batch.mask[PAIRS + 1].nonzero()[-1])
    weights[row, token] = -1e-3
    weights[~batch.mask] = math.nan
    position = int(batch.mask[row].sum()) - 1
    with pytest.raises(InputError, match=f"rejected completion of pair 1 of the batch, token {position};"):
        checked_terms(TokenTerms(weights), batch, "mine")
    weights[row, token] = 0.0
    assert torch.equal(checked_terms((weights,), batch, "mine").reward[batch.mask], weights[batch.mask])


@pytest.mark.parametrize(
    "rule, match",
    [
        (own(None, {"klein"}), "there is no 'klein' to need"),
        (own(None, {"hidden_states"}), "a function has no network"),
        (TokenWeights, "neither an instance"),
        (3, "neither an instance"),
    ],
)
def test_what_is_no_rule_is_refused(rule, match):
    with pytest.raises(InputError, match=match):
        token_rule(rule)


def test_a_rule_that_could_not_be_resumed_is_refused():
    class Forgetful(TokenWeights):
        def state_dict(self):
            return {}

    with pytest.raises(InputError, match="load_state_dict"):
        token_rule(Forgetful())
