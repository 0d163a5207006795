"""Budgets of rollouts: optimal, exact, without regard to the order of a batch; and what the bandits learn."""

import copy
import itertools
import random
from fractions import Fraction

import pytest
import torch

from hf_delta.errors import InputError
from hf_delta.rl.allocation import (
    ALLOCATION_RULES,
    AllocationRule,
    PromptBatch,
    RolloutGDRO,
    greedy_budget,
    nearest_budget,
)
from hf_delta.rl.allocation.exp3 import Exp3Controller
from hf_delta.rl.allocation.variance import VarianceController
from hf_delta.rl.difficulty import Difficulty, PassRates


def batch(solved, seen, mean=4, groups=None, ids=None):
    """Prompts with so many correct of so many rollouts, under a uniform prior."""
    solved, seen = torch.tensor(solved, dtype=torch.float64), torch.tensor(seen, dtype=torch.float64)
    size = len(solved)
    groups = torch.zeros(size, dtype=torch.long) if groups is None else torch.tensor(groups)
    rates = PassRates(1 + solved, 1 + seen - solved, seen, solved)
    return PromptBatch(ids or names(size), rates, groups, int(groups.max()) + 1, round(mean * size))


def names(size):
    return [f"p{i:03d}" for i in range(size)]


def compositions(budget, low, high):
    return (c for c in itertools.product(*map(range, low, [h + 1 for h in high])) if sum(c) == budget)


# -- integer budgets ------------------------------------------------------------------------------------------------
def test_budgets_by_hand():
    # Standard deviations 1 : 2 : 3, and 12 rollouts: the square-root law is 2, 4, 6.
    assert greedy_budget(torch.tensor([1.0, 4.0, 9.0]), 12, 2, 12, names(3)).tolist() == [2, 4, 6]
    assert nearest_budget(torch.tensor([2.0, 12.0, 4.0]), 12, 2, 12, names(3)).tolist() == [2, 8, 2]


@pytest.mark.parametrize("seed", range(40))
def test_no_allocation_beats_the_greedy_one(seed):
    """All allocations within bounds of each prompt's own, in exact arithmetic."""
    rng = random.Random(seed)
    size = rng.randint(1, 4)
    low = [rng.randint(1, 3) for _ in range(size)]
    high = [n + rng.randint(0, 6) for n in low]
    budget = rng.randint(sum(low), sum(high))
    values = [rng.choice([0.0, 0.0625, 0.25, rng.random()]) for _ in range(size)]
    bounds = (torch.tensor(low), torch.tensor(high), names(size))

    def variance(counts):
        return sum(Fraction(v) / n for v, n in zip(values, counts))

    def distance(counts):
        return sum((Fraction(40 * v) - n) ** 2 for v, n in zip(values, counts))

    every = list(compositions(budget, low, high))
    found = tuple(greedy_budget(torch.tensor(values, dtype=torch.float64), budget, *bounds).tolist())
    assert found in every
    assert float(variance(found) - min(map(variance, every))) <= 1e-15
    found = tuple(nearest_budget(40 * torch.tensor(values, dtype=torch.float64), budget, *bounds).tolist())
    assert found in every
    assert float(distance(found) - min(map(distance, every))) <= 1e-9


def test_budgets_are_exact_and_within_bounds():
    rng = random.Random(0)
    for _ in range(3000):
        size = rng.randint(1, 24)
        low = torch.tensor([rng.randint(1, 5) for _ in range(size)])
        high = low + torch.tensor([rng.choice([0, 1, 7, 30]) for _ in range(size)])
        budget = rng.randint(int(low.sum()), int(high.sum()))
        values = torch.tensor([rng.choice([0.0, 1e-300, rng.random(), 1e9 * rng.random()]) for _ in range(size)])
        for rule in (greedy_budget, nearest_budget):
            counts = rule(values, budget, low, high, names(size))
            assert counts.dtype == torch.int64 and counts.sum() == budget
            assert bool((counts >= low).all()) and bool((counts <= high).all())


def test_the_order_of_a_batch_decides_nothing():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        # Three values among 12 prompts: ties everywhere.
        values = torch.tensor([0.0, 0.1, 0.25])[torch.randint(3, (12,), generator=generator)]
        ids = [f"p{i}" for i in torch.randperm(12, generator=generator).tolist()]
        budget = int(torch.randint(24, 120, (), generator=generator))
        order = torch.randperm(12, generator=generator)
        for rule in (greedy_budget, nearest_budget):
            counts = rule(values, budget, 2, 12, ids)
            assert torch.equal(rule(values[order], budget, 2, 12, [ids[i] for i in order]), counts[order])


def test_equal_values_give_equal_budgets_and_the_remainder_to_the_smallest_ids():
    for value in (0.0, 0.2):
        counts = greedy_budget(torch.full((4,), value), 18, 2, 12, ["d", "b", "c", "a"])
        assert counts.tolist() == [4, 5, 4, 5]
    # The same id twice: then by place.
    assert greedy_budget(torch.ones(3), 10, 2, 12, ["a", "a", "a"]).tolist() == [4, 3, 3]


@pytest.mark.parametrize("budget,low,high", [(5, 2, 4), (13, 2, 4), (9, 4, 3)])
def test_budgets_that_do_not_fit_are_refused(budget, low, high):
    with pytest.raises(ValueError, match="do not fit"):
        greedy_budget(torch.ones(3), budget, low, high, names(3))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_variances_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="finite and not negative"):
        greedy_budget(torch.tensor([0.1, value]), 8, 2, 12, names(2))


# -- the controller variance ----------------------------------------------------------------------------------------
def test_variance_follows_the_square_root_law_of_the_posterior():
    rule = RolloutGDRO(n_max=64, exploration=0.0)
    solved = [0, 20, 50, 100, 160, 199]
    made = batch(solved, [200] * 6, mean=20)
    root = made.rates.variance_of_reward.sqrt()
    law = 120 * root / root.sum()
    assert (rule(made) - law).abs().max() < 1
    assert int(rule(made).argmax()) == 3


@pytest.mark.parametrize(
    "solved,seen", [([0] * 5, [0] * 5), ([0] * 5, [8] * 5), ([8] * 5, [8] * 5)], ids=["unseen", "failed", "solved"]
)
@pytest.mark.parametrize("exploration", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mean,counts", [(4, [4] * 5), (3.6, [4, 4, 4, 3, 3])])
def test_prompts_that_look_alike_share_evenly(solved, seen, exploration, mean, counts):
    assert RolloutGDRO(exploration=exploration)(batch(solved, seen, mean)).tolist() == counts


def test_the_floor_is_paid_by_the_others_and_never_above_the_mean():
    solved, seen = [0, 0, 0, 50, 50, 50, 10, 0], [1000, 1000, 1000, 100, 100, 100, 100, 0]
    floors = {0.0: 2, 0.01: 3, 1 / 6: 3, 0.5: 5, 1.0: 8}
    variance = []
    for exploration, floor in floors.items():
        made = batch(solved, seen, mean=8)
        counts = RolloutGDRO(exploration=exploration)(made)
        assert counts.sum() == 64 and counts[:3].tolist() == [floor] * 3
        assert counts[3:].min() >= 2
        variance.append((made.rates.variance_of_reward / counts).sum().item())
    # What a floor takes from the others costs variance, and a higher one more.
    assert variance == sorted(variance) and variance[-1] > variance[0]


def test_the_floor_is_for_what_was_seen_and_is_not_remembered_to_be_solved():
    # Once solved, solved long ago, and never seen: only the middle one counts as unsolved.
    made = batch([1.0, 0.04, 0.0, 200, 200], [400, 400, 0, 400, 400], mean=6)
    floor, none = (RolloutGDRO(exploration=e)(made) for e in (1.0, 0.0))
    assert none[:2].tolist() == [2, 2] and floor[:2].tolist() == [2, 6]
    # Never seen, and known from others of its kind to be easy: no floor.
    pooled = PassRates(torch.tensor([400.0, 1, 1]), torch.ones(3), torch.zeros(3), torch.zeros(3))
    made = PromptBatch(names(3), pooled, torch.zeros(3, dtype=torch.long), 1, 18)
    assert RolloutGDRO(exploration=1.0)(made).tolist() == [2, 8, 8]


def test_a_floor_fits_into_every_batch():
    rng = random.Random(1)
    for _ in range(2000):
        size, n_min = rng.randint(2, 20), rng.randint(2, 4)
        mean = n_min + rng.random() * 6
        budget = round(mean * size)
        n_max = max(rng.choice([-(-budget // size), 12]), -(-budget // size))
        seen = [rng.choice([0, 3, 40]) for _ in range(size)]
        made = batch([rng.choice([0, n]) for n in seen], seen, budget / size)
        if budget < n_min * size:
            continue
        counts = RolloutGDRO(n_min=n_min, n_max=n_max, exploration=rng.random())(made)
        assert counts.sum() == budget and n_min <= counts.min() and counts.max() <= n_max


def test_most_rollouts_are_three_times_the_mean():
    made = batch([0] * 15 + [200], [10**6] * 15 + [400], mean=4)
    assert RolloutGDRO(exploration=0.0)(made).max() == 12
    assert RolloutGDRO(exploration=0.0, n_max=9)(made).max() == 9


# -- the controller exp3 --------------------------------------------------------------------------------------------
RATES = torch.tensor([0.02, 0.5, 0.9], dtype=torch.float64)


def play(rule, rounds, generator, size=12, mean=4):
    """Rounds with four prompts of each of three groups; what was asked for, handed out, and correct."""
    groups = torch.arange(size) % 3
    made = batch([0] * size, [0] * size, mean, groups.tolist())
    history = []
    for _ in range(rounds):
        counts = rule(made)
        correct = torch.binomial(counts.double(), RATES[groups], generator=generator).long()
        rule.update(made, counts, correct)
        history.append(counts.tolist())
    return history


def expected_arms(rule, mean=4):
    return rule.controller.probabilities() @ torch.arange(2, 3 * mean + 1, dtype=torch.float64)


def test_bandits_learn_the_order_of_the_square_root_law():
    asked = []
    for seed in range(4):
        rule = RolloutGDRO("exp3", seed=seed)
        play(rule, 600, torch.Generator().manual_seed(seed))
        asked.append(expected_arms(rule))
        assert rule.controller.price > 0
    hard, even, easy = torch.stack(asked).mean(0).tolist()
    assert hard + 1 < easy < even - 1


def test_estimated_losses_have_the_right_expectation():
    """What a round adds to the scores, over all draws by their probabilities, against the formula, up to a constant."""
    made, allowed, price = batch([0] * 3, [0] * 3, 4), range(2, 7), 0.4
    start = torch.tensor([[0.0, 0.5, 1.0, 0.2, 2.0]], dtype=torch.float64)
    found = torch.zeros(5, dtype=torch.float64)
    for arm in range(5):
        rule = Exp3Controller(gamma=0.3)
        rule(made, allowed)
        rule.scores, rule.reference, rule.price = start.clone(), torch.tensor([0.2], dtype=torch.float64), price
        probability = 0.7 * torch.softmax(-rule.eta * start[0], 0)[arm] + 0.3 / 5
        rule.drawn = torch.tensor([arm])
        rule.update(made, allowed, torch.tensor([2, 4, 6]), torch.tensor([1, 1, 6]))
        found += probability * (rule.scores - start)[0]
    arms = torch.tensor(allowed, dtype=torch.float64)
    # Unbiased variances of 1 of 2, 1 of 4 and 6 of 6: 1/2, 1/4 and 0.
    expected = 0.25 * 4 / arms + price * arms / 4
    assert (found - found.mean()).tolist() == pytest.approx((expected - expected.mean()).tolist(), abs=1e-12)


def test_the_reference_of_a_group_is_the_mean_of_its_last_losses():
    """A running mean up to 20 rounds, and from then on an average that forgets."""
    rule, made, allowed = Exp3Controller(), batch([0] * 2, [0] * 2, 4), range(2, 7)
    expected, generator = 0.0, torch.Generator().manual_seed(0)
    for rounds in range(1, 41):
        rule(made, allowed)
        loss = torch.randint(2, (1,), generator=generator)
        rule.update(made, allowed, torch.full((2,), 2), loss.expand(2))
        # One right and one wrong of two: a variance of 1/2.
        expected += (loss.item() / 2 * 4 / allowed[int(rule.drawn[0])] - expected) / min(rounds, 20)
        assert rule.reference.item() == pytest.approx(expected)


def test_a_prompt_that_was_solved_once_is_not_unsolved_however_faint_the_memory():
    faint, unsolved = batch([0.2, 8.0], [16.0, 16.0], 6), batch([0.0, 8.0], [16.0, 16.0], 6)
    rule = RolloutGDRO(exploration=1.0)
    assert rule(unsolved).tolist() == [6, 6]
    assert rule(faint).tolist()[0] < 6


def test_regret_is_under_the_bound_of_exp3():
    """Losses in [0, 1] without a price: regret at most `gamma T + A eta T / 2 + log(A) / eta`, for every fixed arm."""
    rounds, arms, eta, gamma = 1000, 5, 0.05, 0.05
    regrets = []
    for seed in range(2):
        rule = Exp3Controller(eta=eta, gamma=gamma, price_rate=0.0, seed=seed)
        made, allowed = batch([0] * 2, [0] * 2, 4), range(2, 2 + arms)
        generator, incurred, every = torch.Generator().manual_seed(seed), 0.0, torch.zeros(arms).double()
        for _ in range(rounds):
            counts = rule(made, allowed)
            # One right and one wrong of two scored rollouts is a variance of 1/2, so that arm n loses 2 / n.
            signal = torch.randint(2, (2,), generator=generator)
            losses = signal.double().mean() / 2 * 4 / torch.tensor(allowed, dtype=torch.float64)
            incurred, every = incurred + losses[rule.drawn[0]], every + losses
            rule.update(made, allowed, torch.full((2,), 2), signal)
            assert counts.sum() == 8
        regrets.append((incurred - every.min()).item())
    bound = gamma * rounds + arms * eta * rounds / 2 + torch.tensor(arms).log().item() / eta
    uniform = (every.mean() - every.min()).item()
    assert sum(regrets) / 2 < min(bound, 0.5 * uniform)


def test_the_price_moves_on_what_was_asked_for():
    """The counts always meet the budget; the price must not look at them."""
    rule = RolloutGDRO("exp3", price_rate=0.1)
    made = batch([0] * 4, [0] * 4, 4, [0, 0, 1, 2])
    counts = rule(made)
    asked = [2 + int(rule.controller.drawn[g]) for g in (0, 0, 1, 2)]
    assert counts.sum() == 16 != sum(asked)
    rule.update(made, counts, torch.zeros(4, dtype=torch.long))
    assert rule.controller.price == pytest.approx(0.1 * (sum(asked) / 16 - 1))
    # Without a variance anywhere rollouts are worth nothing, and a price above 0 makes everyone ask for few.
    rule.controller.price, rule.controller.price_rate = 1.0, 0.0
    for _ in range(50):
        rule.update(made, rule(made), torch.zeros(4, dtype=torch.long))
    assert expected_arms(rule).max() < 2.5


def test_bandits_belong_to_the_groups_of_this_batch():
    """Groups that are absent learn nothing, prompts without a group ask for the mean, prompts with one score are left out."""
    rule = RolloutGDRO("exp3", seed=3)
    made = batch([0] * 6, [0] * 6, 4, [0, 0, 2, 2, -1, -1])
    counts = rule(made)
    wishes = torch.tensor([2 + int(rule.controller.drawn[g]) if g >= 0 else 4 for g in (0, 0, 2, 2, -1, -1)]).double()
    assert torch.equal(counts, nearest_budget(wishes, 24, 2, 12, made.prompt_ids))
    scored = torch.tensor([2, 2, 1, 0, 2, 2])
    rule.update(made, scored, torch.tensor([1, 1, 1, 0, 1, 1]))
    assert rule.controller.rounds.tolist() == [1, 0, 0]
    assert rule.controller.scores.abs().sum(1).gt(0).tolist() == [True, False, False]


def test_new_groups_leave_what_the_old_ones_learnt():
    rule = RolloutGDRO("exp3")
    play(rule, 20, torch.Generator().manual_seed(0))
    before = rule.controller.scores.clone()
    rule(batch([0] * 5, [0] * 5, 4, [0, 1, 2, 3, 4]))
    assert torch.equal(rule.controller.scores[:3], before) and rule.controller.scores[3:].tolist() == [[0.0] * 11] * 2


@pytest.mark.parametrize("between", [False, True], ids=["after an update", "between draw and update"])
def test_a_restored_bandit_goes_on_as_if_it_had_not_stopped(between):
    straight, first = RolloutGDRO("exp3", seed=5), RolloutGDRO("exp3", seed=5)
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    play(straight, 30, generators[0])
    play(first, 30, generators[1])
    again = RolloutGDRO("exp3", seed=77)
    made = batch([0] * 3, [0] * 3, 4, [0, 1, 2])
    if between:
        counts = straight(made)
        assert torch.equal(first(made), counts)
    state = first.state_dict()
    kept = copy.deepcopy(state)
    again.load_state_dict(state)
    if between:
        for rule in (straight, again):
            rule.update(made, counts, torch.tensor([0, 1, 2]))
    play(first, 5, torch.Generator().manual_seed(1))
    assert play(again, 30, generators[1]) == play(straight, 30, generators[0])
    assert again.controller.price == straight.controller.price
    assert torch.equal(again.controller.scores, straight.controller.scores)
    # What was saved is a copy, and so is what was restored.
    assert all(torch.equal(state["learnt"][name], kept["learnt"][name]) for name in ("scores", "reference", "rounds"))


def test_draws_leave_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    play(RolloutGDRO("exp3"), 3, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


# -- the rule -------------------------------------------------------------------------------------------------------
def test_the_rule_is_what_recipes_name():
    assert ALLOCATION_RULES["rollout_gdro"] is RolloutGDRO
    assert isinstance(RolloutGDRO(), AllocationRule)
    assert isinstance(RolloutGDRO().controller, VarianceController)
    assert RolloutGDRO().log_metrics() == {} and RolloutGDRO("exp3").log_metrics() == {"gdro/price": 0.0}


def test_it_reads_the_posterior_that_difficulty_keeps():
    difficulty = Difficulty(decay=1.0)
    ids = names(6)
    difficulty.update(ids, torch.tensor([0, 0, 30, 25, 60, 60]), torch.full((6,), 60))
    made = PromptBatch(ids, difficulty.estimate(ids), difficulty.groups(ids), difficulty.num_groups, 48)
    assert RolloutGDRO(exploration=0.0)(made)[[0, 1, 4, 5]].max() < RolloutGDRO(exploration=0.0)(made)[[2, 3]].min()
    counts = RolloutGDRO(exploration=1.0)(made)
    assert counts.sum() == 48 and counts[:2].tolist() == [8, 8] and counts[4:].max() < 8
    assert RolloutGDRO("exp3")(made).sum() == 48


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"controller": "sqrt"}, "controller: 'sqrt' is not one of variance, exp3"),
        ({"n_min": 1}, "n_min must be at least 2, got 1"),
        ({"n_min": 2.5}, "n_min must be a whole number, got 2.5"),
        ({"n_min": True}, "n_min must be a whole number, got True"),
        ({"n_min": 4, "n_max": 3}, r"n_max \(3\) is below n_min \(4\)"),
        ({"n_max": "12"}, "n_max must be a whole number, got '12'"),
        ({"exploration": 1.5}, r"exploration must be a number in \[0, 1\], got 1.5"),
        ({"exploration": float("nan")}, "exploration must be a number"),
        ({"exploration": "0.5"}, "exploration must be a number"),
        ({"eta": 0.5}, "eta belongs to controller: exp3 and does nothing with controller: variance"),
        ({"controller": "exp3", "exploration": 0.5}, "exploration belongs to controller: variance"),
        ({"nmin": 2}, "no setting 'nmin'. With controller: variance it has controller, n_min, n_max, exploration"),
        ({"controller": "exp3", "eta": 0}, "eta must be positive, got 0"),
        ({"controller": "exp3", "gamma": 0}, r"gamma must lie in \(0, 1\], got 0"),
        ({"controller": "exp3", "price_rate": -1}, "price_rate must be 0 or positive, got -1"),
        ({"controller": "exp3", "price_rate": None}, "price_rate must be 0 or positive, got None"),
        ({"controller": "exp3", "seed": 0.5}, "seed must be a whole number, got 0.5"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        RolloutGDRO(**kwargs)


@pytest.mark.parametrize(
    "kwargs,budget,prompts,message",
    [
        ({}, 8, 1, "a batch holds 1. Raise generation_batch_size"),
        ({"n_min": 5}, 32, 8, "n_min is 5, but 32 rollouts for 8 prompts are 4 each. Lower n_min"),
        ({"n_max": 3}, 32, 8, "n_max is 3, but 32 rollouts for 8 prompts are 4 each. Raise n_max"),
    ],
)
def test_budgets_that_leave_no_choice_are_refused(kwargs, budget, prompts, message):
    with pytest.raises(InputError, match=message):
        RolloutGDRO(**kwargs).check(budget, prompts)


@pytest.mark.parametrize("n_min,n_max,mean", [(2, None, 2), (4, 4, 4), (2, 8, 8), (2, None, 64)])
def test_bounds_that_reach_the_mean_are_taken(n_min, n_max, mean):
    rule = RolloutGDRO(n_min=n_min, n_max=n_max)
    rule.check(3 * mean, 3)
    assert rule(batch([0, 1, 8], [8] * 3, mean)).sum() == 3 * mean


def test_states_of_another_controller_or_other_bounds_are_refused():
    with pytest.raises(InputError, match="written with controller: variance, this run has exp3"):
        RolloutGDRO("exp3").load_state_dict(RolloutGDRO().state_dict())
    learnt = RolloutGDRO("exp3")
    play(learnt, 2, torch.Generator().manual_seed(0))
    other = RolloutGDRO("exp3", n_max=8)
    other.load_state_dict(learnt.state_dict())
    with pytest.raises(InputError, match="learnt about 11 numbers of rollouts, and n_min to n_max are now 7"):
        other(batch([0] * 4, [0] * 4))
