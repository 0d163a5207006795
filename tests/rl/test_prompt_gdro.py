"""Prompt-GDRO's weights against its formulas written out, its objective by brute force, and the bound of its game."""

import math
import random
import statistics
from dataclasses import replace

import pytest
import torch

from hf_delta.checkpoint import load_state, save_state
from hf_delta.errors import InputError
from hf_delta.rl.weights import WEIGHT_RULES, PromptGDROWeights, combine_weights
from hf_delta.rl.weights.prompt_gdro import (
    current_scores,
    group_signal,
    learn_scores,
    mean_one_weights,
    multiplicative_weights,
    objective_weights,
    unnormalised_weights,
)
from tests.rl.test_delta_l import batch


def rollouts(groups, rewards, row_weights=None, num_groups=None):
    """A batch from one group a prompt and the list of rewards of that prompt's rollouts."""
    rows = [(p, g, r) for p, (g, scores) in enumerate(zip(groups, rewards)) for r in scores]
    reward = torch.tensor([r for _, _, r in rows], dtype=torch.float32)
    size = max(groups) + 1 if num_groups is None else num_groups
    return replace(
        batch([5] * len(rows), [p for p, _, _ in rows], reward=reward, correct=reward > 0.5),
        groups=torch.tensor([g for _, g, _ in rows]),
        group_names=tuple(f"g{b}" for b in range(size)),
        row_weights=None if row_weights is None else torch.tensor(row_weights, dtype=torch.float64),
    )


def random_rollouts(seed, num_groups=5, prompts=9, absent=0.1):
    """Prompts of random groups with 2 to 6 rollouts each, every prompt counted once; some rewards are missing.

    Group 0 is rarely solved and the last one nearly always.
    """
    rng = random.Random(seed)
    groups = [rng.choice([-1, *range(num_groups)]) for _ in range(prompts)]
    draw = lambda group: rng.choice([0.0, 0.3]) if rng.random() * num_groups > group + 0.5 else 1.0  # noqa: E731
    rewards = [[draw(group) for _ in range(rng.randint(2, 6))] for group in groups]
    rewards = [[math.nan if rng.random() < absent else r for r in scores] for scores in rewards]
    mean = sum(map(len, rewards)) / prompts
    row_weights = [mean / len(scores) for scores in rewards for _ in scores]
    return rollouts(groups, rewards, row_weights, num_groups)


class Transcription:
    """The rule in plain Python numbers: average over the list of all signals, `q` and weights row by row."""

    def __init__(self, signal, form, eta, gamma, beta, cap, clip):
        self.signal, self.form, self.eta, self.gamma, self.beta = signal, form, eta, gamma, beta
        self.cap, self.clip, self.seen = cap, clip, {}

    def score(self, b):
        if b not in self.seen:
            return statistics.fmean(map(self.score, self.seen)) if self.seen else 0.0
        if self.beta is None:
            return sum(self.seen[b])
        s, n = 0.0, len(self.seen[b])
        for value in self.seen[b]:
            s = (1 - self.beta) * s + self.beta * value
        return s / (1 - (1 - self.beta) ** n)

    def weights(self, b):
        groups, rows = b.groups.tolist(), b.row_weights.tolist()
        present = sorted(set(groups) - {-1})
        clip = math.inf if self.clip is None else self.clip
        omega = {g: math.exp(self.eta * max(-clip, min(clip, self.score(g)))) for g in present}
        q = {g: (1 - self.gamma) * omega[g] / sum(omega.values()) + self.gamma / len(present) for g in present}
        inside = sum(r for g, r in zip(groups, rows) if g >= 0)
        share = {g: sum(r for h, r in zip(groups, rows) if h == g) / inside for g in present}
        if self.form == "objective":
            w = {g: q[g] / share[g] for g in present}
        elif self.form == "mean_one":
            mean = sum(q[g] * r for g, r in zip(groups, rows) if g >= 0) / inside
            w = {g: q[g] / mean for g in present}
        else:
            w = omega
        return [1.0 if g < 0 else min(w[g], self.cap) for g in groups]

    def learn(self, b):
        rows = list(zip(b.group_ids.tolist(), b.groups.tolist(), b.reward.tolist(), b.correct.tolist()))
        found = {}
        for prompt in sorted({row[0] for row in rows}):
            scored = [(g, r, c) for p, g, r, c in rows if p == prompt and g >= 0 and not math.isnan(r)]
            if self.signal == "failure" and scored:
                found.setdefault(scored[0][0], []).append(sum(not c for _, _, c in scored) / len(scored))
            if self.signal == "std" and len(scored) > 1:
                found.setdefault(scored[0][0], []).append(statistics.stdev(r for _, r, _ in scored))
        for g, values in found.items():
            self.seen.setdefault(g, []).append(statistics.fmean(values))


@pytest.mark.parametrize("signal", ["failure", "std"])
@pytest.mark.parametrize(
    ("form", "eta", "gamma", "beta", "cap", "clip"),
    [
        ("objective", 3.0, 0.01, 0.12, 15.0, None),
        ("objective", 0.65, 0.2, 1.0, 1.5, 0.4),
        ("objective", 0.4, 0.0, None, 15.0, None),
        ("mean_one", 3.0, 0.01, 0.12, 15.0, None),
        ("mean_one", 8.0, 0.0, 0.5, 1.2, None),
        ("unnormalised", 3.0, 0.01, 0.12, 15.0, 0.6),
        ("unnormalised", 5.0, 0.01, 0.3, 20.0, None),
    ],
)
def test_weights_are_those_of_the_formulas(signal, form, eta, gamma, beta, cap, clip):
    rule = PromptGDROWeights(signal, form, eta, gamma, beta, cap, clip)
    oracle, found = Transcription(signal, form, eta, gamma, beta, cap, clip), set()
    for seed in range(12):
        seen = random_rollouts(seed)
        assert rule(seen).tolist() == pytest.approx(oracle.weights(seen), rel=1e-9)
        oracle.learn(seen)
        found |= {w for w in rule.group_weights().tolist() if w < cap}
    # The cap is not all there is.
    assert len(found) > 8


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_mean_loss_is_the_objective_of_group_dro(seed):
    """With the weights on, the mean loss of a batch is `sum_b q_b mean_b`, `mean_b` the mean over the prompts of a group."""
    rule = PromptGDROWeights(eta=3.0, max_weight=1e9)
    rule(before := random_rollouts(100 + seed))
    seen = random_rollouts(seed)
    weights, groups, rows = rule(seen), seen.groups, seen.row_weights
    losses = torch.randn(len(seen), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inside = groups >= 0
    found = (weights * rows * losses)[inside].sum() / rows[inside].sum()

    # A debiased average of one value is that value.
    signal = group_signal(before)
    scores = torch.where(signal.isnan(), signal.nanmean(), signal)
    present = sorted(set(groups[inside].tolist()))
    q = multiplicative_weights(scores[present], 3.0, 0.01)
    means = []
    for group in present:
        prompts = sorted(set(seen.group_ids[groups == group].tolist()))
        means.append(statistics.fmean(losses[seen.group_ids == prompt].mean().item() for prompt in prompts))
    assert found.item() == pytest.approx(sum(a * b for a, b in zip(q.tolist(), means)), rel=1e-9)
    assert (weights * rows)[inside].sum().item() == pytest.approx(rows[inside].sum().item(), rel=1e-9)


def test_eta_zero_is_inverse_frequency():
    """Every group in the batch counts the same, whatever was learnt."""
    rule = PromptGDROWeights(eta=0.0)
    rule(rollouts([0, 1, 3], [[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    weights = rule(rollouts([0, 0, 0, 1, 3, 3], [[0.0, 1.0]] * 6))
    assert weights.tolist() == pytest.approx([6 / 9] * 6 + [6 / 3] * 2 + [6 / 6] * 4)


def test_forms_by_hand():
    q, share = torch.tensor([0.2, 0.8]), torch.tensor([0.75, 0.25])
    assert objective_weights(q, share).tolist() == pytest.approx([0.2 / 0.75, 3.2])
    assert mean_one_weights(q, share).tolist() == pytest.approx([0.2 / 0.35, 0.8 / 0.35])
    assert unnormalised_weights(torch.tensor([1.0, -3.0]), 2.0, 1.0).tolist() == pytest.approx(
        [math.exp(2), math.exp(-2)]
    )


def test_a_cap_lowers_the_mean_by_what_it_cuts_off_and_leaves_the_rest_alone():
    seen = rollouts([0] * 9 + [1], [[0.0, 1.0]] * 10)
    free, capped = PromptGDROWeights(eta=0.0, max_weight=100)(seen), PromptGDROWeights(eta=0.0, max_weight=2.0)(seen)
    assert free.tolist() == pytest.approx([5 / 9] * 18 + [5.0] * 2)
    assert capped.tolist() == pytest.approx([5 / 9] * 18 + [2.0] * 2)
    assert capped.mean().item() == pytest.approx(1 - 0.1 * 3)


@pytest.mark.parametrize("seed", range(20))
def test_q_is_on_the_simplex_above_its_floor_and_in_the_order_of_the_scores(seed):
    rng = torch.Generator().manual_seed(seed)
    size = 1 + seed % 7
    scores = 10.0 ** (seed % 5) * torch.randn(size, generator=rng, dtype=torch.float64)
    eta, gamma = [0.0, 0.65, 3.0, 500.0][seed % 4], [0.0, 0.01, 0.3, 1.0][seed // 4 % 4]
    q = multiplicative_weights(scores, eta, gamma)
    assert bool(q.isfinite().all()) and q.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert q.min() >= gamma / size * (1 - 1e-12)
    assert bool((q[scores.argsort()].diff() >= 0).all())
    assert torch.allclose(q, multiplicative_weights(scores + 7.0, eta, gamma), atol=1e-9)


def test_the_average_is_debiased():
    """A constant signal gives that score from the first visit on; without the correction it would start at beta of it."""
    total = mass = torch.zeros(2, dtype=torch.float64)
    for _ in range(4):
        total, mass = learn_scores(total, mass, torch.tensor([0.7, math.nan], dtype=torch.float64), 0.1)
        assert current_scores(total, mass).tolist() == pytest.approx([0.7, 0.7])
    assert mass.tolist() == pytest.approx([1 - 0.9**4, 0.0])


def play(rule, adversary, size, rounds):
    """Regret of the rule against the best single group, in a game of losses in [0, 1]."""
    seen = rollouts(range(size), [[0.0, 1.0]] * size)
    total, got = torch.zeros(size, dtype=torch.float64), 0.0
    for t in range(rounds):
        rule(seen)
        q = torch.tensor([rule.log_metrics(seen)[f"gdro/q/g{b}"] for b in range(size)], dtype=torch.float64)
        losses = adversary(t, q)
        rule.on_losses(4 * losses, torch.full((size,), 4))
        total += losses
        got += (q * losses).sum().item()
    return total.max().item() - got


def one_group_is_worst(t, q):
    return torch.eye(len(q), dtype=torch.float64)[2]


def where_least_is_expected(t, q):
    return torch.eye(len(q), dtype=torch.float64)[q.argmin()]


def two_groups_take_turns(t, q):
    return torch.eye(len(q), dtype=torch.float64)[t // 100 % 2]


def noise(t, q):
    return torch.rand(len(q), generator=torch.Generator().manual_seed(t), dtype=torch.float64)


ADVERSARIES = [one_group_is_worst, where_least_is_expected, two_groups_take_turns, noise]
SIZE, ROUNDS = 6, 400
BOUND = math.sqrt(ROUNDS * math.log(SIZE) / 2)


@pytest.mark.parametrize("gamma", [0.0, 0.05])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_regret_of_summed_scores_is_within_the_bound_of_hedge(adversary, gamma):
    rule = PromptGDROWeights("loss", eta=math.sqrt(8 * math.log(SIZE) / ROUNDS), gamma=gamma, beta=None)
    assert play(rule, adversary, SIZE, ROUNDS) <= BOUND + gamma * ROUNDS


def test_averaged_scores_do_not_have_that_bound():
    """Against one group that is worst in every round an average stays put, and pays in every round."""
    averaged = PromptGDROWeights("loss", eta=math.sqrt(8 * math.log(SIZE) / ROUNDS), gamma=0.0, beta=0.12)
    assert play(averaged, one_group_is_worst, SIZE, ROUNDS) > 5 * BOUND


def test_a_batch_does_not_weigh_itself():
    groups, good, bad = [0, 0, 1], [[1.0, 1.0]] * 3, [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    lucky, unlucky = PromptGDROWeights(), PromptGDROWeights()
    for rule in (lucky, unlucky):
        rule(rollouts(groups, [[0.0, 1.0]] * 3))
    assert lucky(rollouts(groups, good)).tolist() == unlucky(rollouts(groups, bad)).tolist()
    later = rollouts(groups, good)
    assert lucky(later)[-1] < unlucky(later)[-1]


@pytest.mark.parametrize("weights", ["objective", "mean_one", "unnormalised"])
def test_sequences_in_no_group_weigh_one_and_change_nothing_for_the_others(weights):
    rule, other = PromptGDROWeights(weights=weights), PromptGDROWeights(weights=weights)
    for _ in range(3):
        found = rule(rollouts([-1, 0, 0, 1, -1], [[0.0] * 7, [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0]], num_groups=2))
        alone = other(rollouts([0, 0, 1], [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
        assert found[:7].tolist() == [1.0] * 7 and found[-1] == 1.0
        assert torch.equal(found[7:-1], alone)
    nobody = rollouts([-1, -1], [[0.0, 1.0], [1.0, 1.0]], num_groups=2)
    assert rule(nobody).tolist() == [1.0] * 4 and rule.log_metrics(nobody) == {}


def test_absent_groups_keep_their_score_and_a_new_one_starts_at_the_mean():
    rule = PromptGDROWeights(weights="unnormalised", eta=1.0, beta=0.5, max_weight=100)
    rule(rollouts([0, 1], [[0.0, 0.0], [1.0, 1.0]], num_groups=3))
    for _ in range(3):
        rule(rollouts([1], [[1.0, 1.0]], num_groups=3))
    assert rule.group_weights()[[0, 2]].isnan().all()
    rule(rollouts([0, 1, 2], [[1.0, 1.0]] * 3))
    assert rule.group_weights().log().tolist() == pytest.approx([1.0, 0.0, 0.5])


def test_groups_may_come_up_during_the_run():
    rule, known = PromptGDROWeights(), PromptGDROWeights()
    for rewards in ([[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 1.0]]):
        found = rule(rollouts([0, 1], rewards))
        assert torch.equal(found, known(rollouts([0, 1], rewards, num_groups=4)))
    late = rollouts([0, 1, 3], [[0.0, 1.0]] * 3)
    assert torch.equal(rule(late), known(late))
    losses = PromptGDROWeights("loss")
    losses.on_losses(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 1, 1]))
    losses.on_losses(torch.tensor([0.5]), torch.tensor([1]))
    assert losses(late).isfinite().all()


def test_scores_that_no_signal_could_be_taken_from_stay():
    rule = PromptGDROWeights("std")
    seen = rollouts([0, 1], [[0.0, 1.0], [1.0, 1.0]])
    rule(seen)
    before = rule.state_dict()["total"].clone()
    rule(rollouts([0, 1], [[0.0, math.nan], [math.nan, math.nan]]))
    assert torch.equal(rule.state_dict()["total"], before)
    losses = PromptGDROWeights("loss")
    losses.on_losses(torch.tensor([0.0, math.nan]), torch.tensor([0, 2]))
    assert losses.state_dict()["mass"].tolist() == [0.0, 0.0]


def test_the_loss_signal_is_inert_with_advantages_centred_by_prompt():
    """At ratio 1 the surrogate of a sequence is `-A_i`: groups that fail and groups that learn look the same."""
    seen = rollouts([0, 0, 1], [[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    rule, balancing = PromptGDROWeights("loss", eta=500.0, gamma=0.0), PromptGDROWeights(eta=0.0)
    for _ in range(3):
        assert rule(seen).tolist() == pytest.approx(balancing(seen).tolist())
        advantages = torch.cat([(r - r.mean()) / (r.std() + 1e-4) for r in seen.reward.double().view(3, 4)])
        rule.on_losses(
            *(torch.zeros(2).double().index_add_(0, seen.groups, v) for v in (-advantages, torch.ones(12).double()))
        )
    assert PromptGDROWeights("failure").needs == {"groups"} and rule.needs == {"groups", "losses"}


@pytest.mark.parametrize("options", [{}, {"signal": "std", "weights": "mean_one"}, {"beta": None}])
def test_a_saved_rule_goes_on_bit_for_bit(tmp_path, options):
    rule, resumed = PromptGDROWeights(**options), PromptGDROWeights(**options)
    for seed in range(6):
        rule(random_rollouts(seed))
    save_state(tmp_path / "state.safetensors", rule.state_dict())
    resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
    for seed in range(6, 12):
        assert torch.equal(rule(random_rollouts(seed)), resumed(random_rollouts(seed)))
    assert not torch.equal(PromptGDROWeights(**options)(random_rollouts(5)), rule(random_rollouts(5)))


@pytest.mark.parametrize(("key", "there", "here"), [("signal", {"signal": "std"}, {}), ("summed", {"beta": None}, {})])
def test_scores_of_another_scale_are_refused(key, there, here):
    with pytest.raises(InputError, match=f"have {key}: .* this run has {key}: "):
        PromptGDROWeights(**here).load_state_dict(PromptGDROWeights(**there).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "reward"}, "signal must be one of failure, std, loss, got 'reward'"),
        ({"weights": "mean-one"}, "weights must be one of objective"),
        ({"eta": -0.1}, "eta must be a number of at least 0, got -0.1"),
        ({"eta": math.inf}, "eta must be"),
        ({"eta": "3"}, "eta must be .* got '3'"),
        ({"gamma": 1.5}, r"gamma must be a number in \[0, 1\]"),
        ({"gamma": math.nan}, "gamma must be"),
        ({"beta": 0}, r"beta must be a number in \(0, 1\], or null"),
        ({"beta": 1.1}, "beta must be"),
        ({"max_weight": 0.5}, "max_weight must be a number of at least 1"),
        ({"max_weight": True}, "max_weight must be"),
        ({"score_clip": 0.0}, "score_clip must be a positive number"),
        ({"beta": None, "score_clip": 1.0}, "beta: null sums"),
        ({"beta": None, "weights": "unnormalised"}, "beta: null sums"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=f"prompt_gdro: {message}"):
        PromptGDROWeights(**options)


def test_a_batch_without_groups_is_refused():
    assert WEIGHT_RULES["prompt_gdro"] is PromptGDROWeights
    with pytest.raises(InputError, match="needs batches with difficulty groups"):
        combine_weights([PromptGDROWeights()], batch([1, 2]))


def test_failure_goes_by_verdicts_and_spread_by_rewards():
    """Where one function judges, a row may have a reward and no verdict, or the reverse."""
    made = rollouts([0, 1], [[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    made = replace(made, judged=torch.tensor([True, True, False, False, True, True, True, True]))
    assert group_signal(made, "failure").tolist() == [0.5, 0.5]
    made = replace(made, judged=torch.tensor([True, False, False, False, False, False, True, True]))
    assert group_signal(made, "failure").tolist() == [0.0, 1.0]
    assert group_signal(made, "std").tolist() == pytest.approx([statistics.stdev([1, 0, 0, 1])] * 2)
