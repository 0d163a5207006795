"""Pass rates of prompts against lists of visits in a dict, and what the bins do against cases worked out by hand."""

import functools
import math
import random

import numpy as np
import pytest
import torch

from hf_delta.checkpoint import load_state, save_state
from hf_delta.errors import InputError
from hf_delta.rl.difficulty import Difficulty, PassRateBins


# No pass rate of whole rollouts falls on one of these, so that rounding decides nothing.
EDGES = (0.2137, 0.4071, 0.6113, 0.8191)
WAYS = {
    "decay": {"decay": 0.8},
    "no forgetting": {"decay": 1.0},
    "window": {"window": 3},
    "default": {},
    "pools": {"prior_column": "level"},
    "window and pools": {"window": 2, "prior_column": "level", "prior": (0.5, 2.0)},
    "extremes": {"exclude_extremes": True},
    "extremes in a window": {"exclude_extremes": True, "window": 2},
}


class Reference:
    """Every visit of every prompt, and all sums made anew each time."""

    def __init__(
        self, decay=None, window=None, prior=(1.0, 1.0), prior_column=None, hysteresis=0.03, exclude_extremes=False
    ):
        self.weight = (lambda age: float(age < window)) if window else (lambda age: (decay or 0.7) ** age)
        self.prior, self.pooled, self.hysteresis, self.excluded = prior, prior_column, hysteresis, exclude_extremes
        self.visits, self.pools, self.bins = {}, {}, {}
        self.counts = functools.cache(self._counts)

    def _counts(self, visits):
        ages = [(self.weight(age), visit) for age, visit in enumerate(reversed(visits))]
        return [math.fsum(weight * visit[side] for weight, visit in ages) for side in (0, 1)]

    def posterior(self, name, value):
        a, b = self.prior
        if self.pooled:
            right, wrong = self.counts(tuple(self.pools.get(value, [])))
            mean = (a + right) / (a + b + right + wrong)
            a, b = (a + b) * mean, (a + b) * (1 - mean)
        right, wrong = self.counts(tuple(self.visits.get(name, [])))
        return a + right, b + wrong, right + wrong, right

    def bin(self, name, value):
        alpha, beta, *_ = self.posterior(name, value)
        mean, was = alpha / (alpha + beta), self.bins.get(name)
        plain = sum(mean >= edge for edge in EDGES)
        if was is None or plain == was:
            return plain
        if plain > was:
            return plain if mean >= EDGES[was] + self.hysteresis else was
        return plain if mean < EDGES[was - 1] - self.hysteresis else was

    def group(self, name, value):
        *_, seen, right = self.posterior(name, value)
        extreme = min(right, seen - right) < 0.05
        return -1 if self.excluded and seen and extreme else self.bin(name, value)

    def update(self, names, correct, rollouts, values):
        for store, keys in ((self.visits, names), (self.pools, values)):
            batch = {}
            for key, right, total in zip(keys, correct, rollouts):
                old = batch.get(key, (0, 0))
                batch[key] = (old[0] + right, old[1] + total - right)
            for key, visit in batch.items():
                if sum(visit):
                    store.setdefault(key, []).append(visit)
        seen_now = {name: value for name, value, total in zip(names, values, rollouts) if total}
        self.bins.update({name: self.bin(name, value) for name, value in seen_now.items()})


@functools.cache
def batches(seed, steps, prompts=40, size=12):
    """Prompts that come again and again, some twice in a batch, some without a scored rollout, at drifting pass rates."""
    generator, found = random.Random(seed), []
    for step in range(steps):
        names = [f"p{generator.randrange(prompts)}" for _ in range(size)]
        rollouts = [generator.choice([0, 1, 4, 8, 16]) for _ in names]
        rates = [0.5 + 0.5 * math.sin(hash_of(name) + 0.2 * step) for name in names]
        correct = [sum(generator.random() < p for _ in range(n)) for p, n in zip(rates, rollouts)]
        found.append((names, correct, rollouts, [f"level {hash_of(name) % 3}" for name in names]))
    return found


def hash_of(name):
    return int(name[1:])


def updated(difficulty, batch):
    names, correct, rollouts, values = batch
    difficulty.update(names, torch.tensor(correct), torch.tensor(rollouts), values)


def one(difficulty, correct, rollouts, name="p"):
    """One visit of one prompt, and the bin it is in then."""
    difficulty.update([name], torch.tensor([correct]), torch.tensor([rollouts]))
    return difficulty.groups([name]).item()


def same(first, second):
    """Whether two states hold the same bits."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_lists_of_visits(way, seed):
    ours, reference = Difficulty(edges=EDGES, **WAYS[way]), Reference(**WAYS[way])
    names = [f"p{i}" for i in range(45)]  # p40 to p44 never come
    values = [f"level {hash_of(name) % 3}" for name in names]
    groups = set()
    for batch in batches(seed, steps=30):
        updated(ours, batch)
        reference.update(*batch)
        rates = ours.estimate(names, values)
        expected = [reference.posterior(*pair) for pair in zip(names, values)]
        found = torch.stack([rates.alpha, rates.beta, rates.seen, rates.solved], dim=1)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert ours.groups(names, values).tolist() == [reference.group(*pair) for pair in zip(names, values)]
        groups |= set(ours.groups(names, values).tolist())
    assert ours.num_prompts == len(reference.visits) <= 40
    assert groups >= {0, 1, 2, 3, 4} - ({0, 4} if ours.exclude_extremes else set())
    assert (-1 in groups) == ours.exclude_extremes


def test_mean_and_expected_variance_of_reward():
    """Against the integral over the Beta density on a grid."""
    ours = Difficulty(decay=1.0, prior=(1.5, 2.0))
    ours.update(["p"], torch.tensor([3]), torch.tensor([8]))
    rates = ours.estimate(["p"])
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = p**3.5 * (1 - p) ** 6
    density /= density.sum()
    assert rates.mean.item() == pytest.approx((p * density).sum().item(), rel=1e-8)
    assert rates.variance_of_reward.item() == pytest.approx((p * (1 - p) * density).sum().item(), rel=1e-8)
    assert len(rates) == 1


def test_reading_changes_nothing_and_unseen_prompts_take_no_room():
    ours = Difficulty()
    updated(ours, batches(0, 1)[0])
    before, size = ours.state_dict(), ours.num_prompts
    ours.estimate(["new", "p1"])
    assert ours.groups(["new", "new"]).tolist() == [2, 2]
    ours.update(["new", "other"], torch.tensor([0, 0]), torch.tensor([0, 0]))
    ours.update([], torch.tensor([]), torch.tensor([]))
    assert ours.num_prompts == size and same(ours.state_dict(), before)
    assert ours.estimate([]).mean.shape == ours.groups([]).shape == (0,)


def test_a_batch_is_one_visit_however_often_a_prompt_stands_in_it():
    split, whole = Difficulty(decay=0.5), Difficulty(decay=0.5)
    for _ in range(2):
        split.update(["a", "b", "a"], torch.tensor([1, 4, 2]), torch.tensor([4, 4, 4]))
        whole.update(["b", "a"], torch.tensor([4.0, 3.0]), torch.tensor([4.0, 8.0]))
    assert whole.estimate(["a"]).seen.item() == 12 and whole.estimate(["a"]).solved.item() == 4.5
    assert same(split.state_dict(), whole.state_dict())


def test_asking_twice_is_not_asking_for_the_same():
    """What the last call looked up stands for the same prompts only, and only until something is learnt or loaded."""
    ours, ids, levels = Difficulty(prior_column="level"), ["a", 1], ["x", "y"]
    start = ours.state_dict()
    ours.update(ids, torch.tensor([4, 0]), torch.tensor([4, 4]), levels)
    rates = ours.estimate(ids, levels)
    expected = rates.alpha.tolist()
    rates.alpha.zero_(), rates.solved.zero_()
    assert ours.estimate(ids, levels).alpha.tolist() == expected
    assert ours.estimate(ids, ["y", "x"]).alpha.tolist() != expected
    assert ours.estimate(ids, levels).alpha.tolist() == expected
    assert ours.estimate(["a", True], levels).seen.tolist() == [4, 0]
    with pytest.raises(InputError, match="Entry 1 of the prompt ids is 1.0"):
        ours.estimate(["a", 1.0], levels)
    ids[0] = "new"
    assert ours.estimate(ids, levels).seen.tolist() == [0, 4]
    ours.update(ids, torch.tensor([0, 0]), torch.tensor([2, 0]), levels)
    assert ours.estimate(ids, levels).seen.tolist() == [2, 4] and ours.groups(ids, levels).tolist() == [1, 0]
    ours.load_state_dict(start)
    assert ours.estimate(ids, levels).seen.tolist() == [0, 0] and ours.groups(ids, levels).tolist() == [2, 2]


def test_numbers_and_their_digits_are_the_same_id():
    ours = Difficulty()
    ours.update([7], torch.tensor([1]), torch.tensor([2]))
    assert ours.estimate(["7"]).seen.item() == 2


class TestHysteresis:
    """Without a prior to speak of and with a memory of one visit, the mean is what the last visit says, in hundredths."""

    def difficulty(self, hysteresis=0.03):
        return Difficulty(window=1, prior=(1e-9, 1e-9), hysteresis=hysteresis)

    def test_upwards(self):
        ours = self.difficulty()
        path = [(50, 2), (61, 2), (62, 2), (64, 3), (81, 3), (84, 4), (100, 4)]
        assert [one(ours, percent, 100) for percent, _ in path] == [group for _, group in path]

    def test_downwards(self):
        ours = self.difficulty()
        path = [(90, 4), (79, 4), (78, 4), (76, 3), (58, 3), (56, 2), (38, 2), (36, 1), (18, 1), (16, 0), (0, 0)]
        assert [one(ours, percent, 100) for percent, _ in path] == [group for _, group in path]

    def test_several_bins_at_once_pass_the_boundary_of_the_bin_left(self):
        """41 % is within 0.03 of an edge, but not of one of the bin that is left."""
        ours = self.difficulty()
        path = [(5, 0), (41, 2), (99, 4), (59, 2), (1, 0), (21, 0), (61, 3), (21, 1), (99, 4), (41, 2), (19, 0)]
        assert [one(ours, percent, 100) for percent, _ in path] == [group for _, group in path]

    def test_a_first_visit_has_no_bin_to_leave(self):
        """The prior of 0.5 is in bin 2, and 61 % is not 0.03 above it."""
        assert one(self.difficulty(), 61, 100) == 3

    def test_none(self):
        ours = self.difficulty(hysteresis=0)
        path = [(50, 2), (61, 3), (59, 2), (79, 3), (81, 4), (19, 0)]
        assert [one(ours, percent, 100) for percent, _ in path] == [group for _, group in path]

    def test_asking_does_not_move_a_prompt(self):
        """Ten questions at 62 % leave it in bin 2, as does the next visit."""
        ours = self.difficulty()
        one(ours, 50, 100)
        assert {one(ours, 62, 100), *(ours.groups(["p"]).item() for _ in range(10)), one(ours, 61, 100)} == {2}

    def test_uneven_edges(self):
        bins = PassRateBins([0.1, 0.9], 0.05)
        found = bins.of(np.array([0.12, 0.12, 0.16, 0.94, 0.86, 0.84]), np.array([0, -1, 0, 1, 2, 2]))
        assert found.tolist() == [0, 1, 1, 1, 2, 1]


class TestExtremes:
    def test_all_right_and_all_wrong_in_a_window(self):
        ours = Difficulty(window=2, exclude_extremes=True)
        assert ours.groups(["p"]).item() == 2
        assert one(ours, 4, 4) == -1
        assert one(ours, 3, 4) == 4  # 8 of 10 with the prior, one wrong among them
        assert one(ours, 4, 4) == 4
        assert one(ours, 4, 4) == -1  # the wrong one is out of the window
        assert one(ours, 0, 4) == 2
        assert one(ours, 0, 4) == -1

    @pytest.mark.parametrize("right", [True, False])
    def test_a_single_exception_fades(self, right):
        """0.7^8 = 0.058 still counts, 0.7^9 = 0.040 does not."""
        ours = Difficulty(exclude_extremes=True)
        visits = [1 if right else 3] + 12 * [0 if right else 4]
        excluded = [one(ours, correct, 4) == -1 for correct in visits]
        assert excluded == 9 * [False] + 4 * [True]

    def test_without_forgetting_one_exception_is_enough(self):
        ours = Difficulty(decay=1.0, exclude_extremes=True)
        assert [one(ours, correct, 4) == -1 for correct in [0, 1, *(30 * [0])]] == [True] + 31 * [False]


class TestPooledPrior:
    def test_by_hand(self):
        """Easy: (1 + 14) / (2 + 16); hard: (1 + 1) / (2 + 16). Prior strength 2 about that."""
        ours = Difficulty(decay=0.5, prior_column="level")
        ours.update(["a", "b", "c"], torch.tensor([8, 6, 1]), torch.tensor([8, 8, 16]), ["easy", "easy", "hard"])
        rates = ours.estimate(["new", "new", "new", "a"], ["easy", "hard", "unknown", "easy"])
        assert rates.mean[:3].tolist() == pytest.approx([15 / 18, 2 / 18, 0.5])
        assert (rates.alpha + rates.beta).tolist() == pytest.approx([2, 2, 2, 10])
        assert rates.mean[3].item() == pytest.approx((2 * 15 / 18 + 8) / 10)
        assert ours.groups(["new"] * 3, ["easy", "hard", "unknown"]).tolist() == [4, 0, 2]
        # A batch with a value halves what was known of it, and leaves the others alone.
        ours.update(["d"], torch.tensor([0]), torch.tensor([4]), ["easy"])
        means = ours.estimate(["new", "new"], ["easy", "hard"]).mean
        assert means.tolist() == pytest.approx([(1 + 7) / (2 + 8 + 4), 2 / 18])

    def test_a_value_is_no_prompt(self):
        ours = Difficulty(prior_column="level")
        ours.update(["a"], torch.tensor([0]), torch.tensor([8]), ["a"])
        assert ours.estimate(["a", "b"], ["b", "b"]).seen.tolist() == [8, 0]
        assert ours.num_prompts == 1

    def test_a_value_may_have_more_rollouts_than_a_prompt(self):
        ours = Difficulty(window=2, prior_column="level")
        names = [str(i) for i in range(40)]
        ours.update(names, torch.full((40,), 500), torch.full((40,), 1000), 40 * ["easy"])
        assert ours.estimate(["new"], ["easy"]).mean.item() == 0.5
        ours.update(names, torch.full((40,), 32767), torch.full((40,), 32767), 40 * ["easy"])
        expected = (1 + 40 * 33267) / (2 + 40 * 33767)
        assert ours.estimate(["new"], ["easy"]).mean.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("decay, lag, deviation", [(0.7, 2.3, 0.074), (0.9, 9.0, 0.041)])
def test_lag_and_noise_of_the_defaults_are_those_documented(decay, lag, deviation):
    ramp, noise = Difficulty(decay=decay), Difficulty(decay=decay)
    for step in range(200):
        ramp.update(["p"], torch.tensor([1_000_000 + 1000 * step]), torch.tensor([10_000_000]))
    rates = ramp.estimate(["p"])
    assert (0.1 + 1e-4 * 199 - (rates.solved / rates.seen).item()) / 1e-4 == pytest.approx(lag, abs=0.05)
    names, generator = [str(i) for i in range(1500)], np.random.default_rng(0)
    for _ in range(50):
        noise.update(names, torch.from_numpy(generator.binomial(8, 0.5, 1500)), torch.full((1500,), 8))
    rates = noise.estimate(names)
    assert (rates.solved / rates.seen).std().item() == pytest.approx(deviation, rel=0.05)


class TestState:
    @pytest.mark.parametrize("way", WAYS)
    def test_a_run_stopped_half_way_goes_on_bit_for_bit(self, way, tmp_path):
        straight, stopped = Difficulty(**WAYS[way]), Difficulty(**WAYS[way])
        steps = batches(5, steps=40, prompts=1500, size=200)
        for step in steps[:20]:
            updated(straight, step)
            updated(stopped, step)
        save_state(tmp_path / "state.safetensors", stopped.state_dict())
        resumed = Difficulty(**WAYS[way])
        updated(resumed, steps[30])  # what was there before is replaced
        resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
        assert same(resumed.state_dict(), stopped.state_dict())
        for names, correct, rollouts, values in steps[20:]:
            assert torch.equal(straight.groups(names, values), resumed.groups(names, values))
            assert torch.equal(straight.estimate(names, values).alpha, resumed.estimate(names, values).alpha)
            updated(straight, (names, correct, rollouts, values))
            updated(resumed, (names, correct, rollouts, values))
        assert straight.num_prompts > 1300
        assert same(straight.state_dict(), resumed.state_dict())

    def test_order_of_arrival_does_not_show(self):
        """In a batch, whatever is known; of batches, if they have no prompt in common."""
        batch = batches(2, 1, prompts=500, size=300)[0]
        shuffled = [list(column) for column in zip(*random.Random(0).sample(list(zip(*batch)), 300))]
        first, second = Difficulty(prior_column="level"), Difficulty(prior_column="level")
        updated(first, batch)
        updated(second, shuffled)
        assert same(first.state_dict(), second.state_dict())
        other = batches(3, 1, prompts=500, size=300)[0]
        other = ([f"q{name}" for name in other[0]], *other[1:])
        first, second = Difficulty(), Difficulty()
        for difficulty, order in ((first, (batch, other)), (second, (other, batch))):
            for one_batch in order:
                updated(difficulty, one_batch)
        assert same(first.state_dict(), second.state_dict())

    def test_an_empty_one(self, tmp_path):
        save_state(tmp_path / "state.safetensors", Difficulty(window=2).state_dict())
        ours = Difficulty(window=2)
        ours.load_state_dict(load_state(tmp_path / "state.safetensors"))
        assert one(ours, 8, 8) == 4

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"window": 3}, "learnt with window=2, and this run has window=3"),
            ({}, "learnt with window=2, and this run has window=None"),
            ({"window": 2, "edges": (0.3, 0.7)}, r"learnt with edges=\[0.2, 0.4, 0.6, 0.8\]"),
            ({"window": 2, "prior_column": "topic"}, "learnt with prior_column='level'"),
            ({"window": 2}, "learnt with prior_column='level', and this run has prior_column=None"),
        ],
    )
    def test_of_other_settings_is_refused(self, settings, message):
        state = Difficulty(window=2, prior_column="level").state_dict()
        ours = Difficulty(**settings)
        with pytest.raises(InputError, match=message):
            ours.load_state_dict(state)

    def test_settings_that_may_change(self):
        first = Difficulty(decay=0.9)
        one(first, 1, 2)
        second = Difficulty(decay=0.5, prior=(2, 2), hysteresis=0.1, exclude_extremes=True)
        second.load_state_dict(first.state_dict())
        # 4.5 / 7 is 0.043 above the edge of bin 2: enough for the old hysteresis and not for the new one.
        assert one(second, 2, 2) == 2 and second.estimate(["p"]).alpha.item() == 2 + 2.5

    @pytest.mark.parametrize(
        "path, value",
        [
            (("version",), torch.tensor(2)),
            (("version",), None),
            (("prompts",), None),
            (("edges",), [0.2]),
            (("prompts", "keys"), torch.tensor([1, 1])),
            (("prompts", "keys"), torch.tensor([1.0, 2.0])),
            (("prompts", "counts"), torch.ones(1, 2, dtype=torch.float64)),
            (("prompts", "counts"), torch.ones(2, 2)),
            (("prompts", "counts"), -torch.ones(2, 2, dtype=torch.float64)),
            (("prompts", "counts"), torch.full((2, 2), math.nan, dtype=torch.float64)),
            (("prompts", "labels"), torch.tensor([0, 5], dtype=torch.int8)),
            (("prompts", "labels"), torch.tensor([0], dtype=torch.int8)),
            (("pools", "keys"), torch.tensor([3])),
        ],
    )
    def test_a_damaged_one_is_refused_and_changes_nothing(self, path, value):
        first, ours = Difficulty(), Difficulty()
        first.update(["a", "b"], torch.tensor([1, 2]), torch.tensor([2, 2]))
        one(ours, 1, 2)
        state, before = first.state_dict(), ours.state_dict()
        inner = state[path[0]] if len(path) == 2 else state
        if value is None:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        with pytest.raises(InputError, match="damaged|in format 2"):
            ours.load_state_dict(state)
        assert same(ours.state_dict(), before)


def test_bytes_of_a_prompt():
    """At the worst count of prompts, at most 64 beside the digest for the longest window, see `LONGEST_WINDOW`."""
    for settings in ({}, {"window": 8}):
        ours, most = Difficulty(**settings), 0.0
        for first in range(0, 24_000, 500):
            names = [str(i) for i in range(first, first + 500)]
            ours.update(names, torch.zeros(500), torch.ones(500))
            most = max(most, ours.nbytes / ours.num_prompts - 8 if first > 8000 else 0)
        assert 25 < most <= 64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"decay": 0.0}, "decay must be more than 0"),
        ({"decay": 1.5}, "decay must be more than 0"),
        ({"decay": "0.9"}, "decay must be more than 0"),
        ({"decay": math.nan}, "decay must be more than 0"),
        ({"window": 0}, "window must be a whole number"),
        ({"window": 9}, "for a longer memory use decay"),
        ({"window": 2.0}, "window must be a whole number"),
        ({"window": True}, "window must be a whole number"),
        ({"window": 2, "decay": 0.9}, "decay or window and not both"),
        ({"prior": (1.0, 0.0)}, "prior must be two positive"),
        ({"prior": (1.0,)}, "prior must be two positive"),
        ({"prior": 1.0}, "prior must be two positive"),
        ({"prior": (1.0, math.inf)}, "prior must be two positive"),
        ({"prior_column": ""}, "prior_column must be the name"),
        ({"prior_column": 3}, "prior_column must be the name"),
        ({"edges": ()}, "1 to 99 ascending"),
        ({"edges": (0.4, 0.2)}, "1 to 99 ascending"),
        ({"edges": (0.4, 0.4)}, "1 to 99 ascending"),
        ({"edges": (0.0, 0.4)}, "1 to 99 ascending"),
        ({"edges": (0.4, 1.0)}, "1 to 99 ascending"),
        ({"edges": [i / 101 for i in range(1, 101)]}, "1 to 99 ascending"),
        ({"edges": "0.2,0.4"}, "edges must be a list"),
        ({"edges": (0.2, math.nan)}, "edges must be a list"),
        ({"edges": 0.5}, "edges must be a list"),
        ({"hysteresis": -0.01}, "hysteresis must be at least 0"),
        ({"hysteresis": 0.2}, "hysteresis must be at least 0 and less than 0.2"),
        ({"hysteresis": math.nan}, "hysteresis must be at least 0"),
        ({"hysteresis": None}, "hysteresis must be at least 0"),
        ({"exclude_extremes": "yes"}, "exclude_extremes must be true or false"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=message):
        Difficulty(**arguments)


@pytest.mark.parametrize(
    "settings, arguments, message",
    [
        ({}, (["a", None], [1, 1], [2, 2]), "Entry 1 of the prompt ids is None"),
        ({}, ([1.5], [1], [2]), "Entry 0 of the prompt ids is 1.5"),
        ({}, (["a"], [1, 1], [2, 2]), r"correct has shape \(2,\)"),
        ({}, (["a", "b"], [1, 1], [2]), r"rollouts has shape \(1,\)"),
        ({}, (["a", "b"], [0, 3], [2, 2]), "Entry 1 has 3 correct of 2"),
        ({}, (["a"], [-1], [2]), "Entry 0 has -1 correct"),
        ({}, (["a"], [-1], [-1]), "Entry 0 has -1 correct"),
        ({}, (["a"], [0.5], [2]), "correct must be whole numbers, got 0.5"),
        ({}, (["a"], [1], [math.nan]), "rollouts must be whole numbers, got nan"),
        ({}, (["a"], [1], [math.inf]), "rollouts must be whole numbers, got inf"),
        ({"window": 2}, (["b", "a", "a"], [0, 0, 0], [1, 20_000, 20_000]), "Prompt 'a' has more than 32767 rollouts"),
        ({"prior_column": "level"}, (["a"], [1], [2]), "prior_column is 'level', .* got none"),
        ({"prior_column": "level"}, (["a"], [1], [2], ["x", "y"]), "each of the 1 prompts; got 2"),
        ({"prior_column": "level"}, (["a"], [1], [2], [None]), "Entry 0 of the column 'level' is None"),
    ],
)
def test_bad_batches_change_nothing(settings, arguments, message):
    ours = Difficulty(**settings)
    before = ours.state_dict()
    names, correct, rollouts, *columns = arguments
    with pytest.raises(InputError, match=message):
        ours.update(names, torch.tensor(correct), torch.tensor(rollouts), *columns)
    assert same(ours.state_dict(), before)


def test_names_of_groups():
    assert Difficulty().group_names == ["0.0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1.0"]
    assert (
        Difficulty(edges=[0.25]).group_names == ["0.0-0.25", "0.25-1.0"] and Difficulty(edges=[0.25]).num_groups == 2
    )
