"""Multipliers against loops over a dict, their fixed points, and problems whose multipliers are known."""

import math
import random

import pytest
import torch

from hf_delta.checkpoint import load_state, save_state
from hf_delta.errors import InputError
from hf_delta.preference.feasible import Multipliers, dual_ascent, sample_keys, tail_report


WAYS = {
    "plain": {"epsilon": 0.3, "eta": 0.5},
    "resilient": {"epsilon": 0.3, "eta": 0.5, "alpha": 2.0},
    "no memory": {"epsilon": 0.3, "eta": 1.0, "alpha": 1.0},
    "from zero": {"epsilon": 0.1, "eta": 0.5, "initial": 0.0},
    "ERM": {"epsilon": 0.3, "eta": 0.0},
}
every_way = pytest.mark.parametrize("way", WAYS)


class Reference:
    """One sample at a time, in plain floats."""

    def __init__(self, epsilon, eta=1.0, alpha=None, initial=1.0):
        self.epsilon, self.eta, self.alpha, self.initial = epsilon, eta, alpha, initial
        self.multipliers, self.losses = {}, {}

    def update(self, names, losses):
        batch = {}
        for name, loss in zip(names, losses):
            batch.setdefault(name, []).append(loss)
        for name, values in batch.items():
            loss, before = math.fsum(values) / len(values), self.multipliers.get(name, self.initial)
            slack = before / self.alpha if self.alpha else 0.0
            self.multipliers[name] = max(0.0, before + self.eta * (loss - self.epsilon - slack))
            self.losses[name] = loss


def batches(seed, steps, samples=40, size=12):
    """Samples drawn with repetition."""
    draw = random.Random(seed)
    for _ in range(steps):
        names = [f"sample {draw.randrange(samples)}" for _ in range(size)]
        yield names, [draw.expovariate(2.0) for _ in names]


def updated(ours, names, losses):
    ours.update(sample_keys(names), torch.tensor(losses, dtype=torch.float64))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@every_way
def test_against_loops(way):
    ours, reference = Multipliers(**WAYS[way]), Reference(**WAYS[way])
    names = [f"sample {i}" for i in range(45)]
    for batch in batches(0, steps=60):
        updated(ours, *batch)
        reference.update(*batch)
        expected = [reference.multipliers.get(name, reference.initial) for name in names]
        torch.testing.assert_close(ours.weights(sample_keys(names)).tolist(), expected, rtol=1e-6, atol=1e-12)
    state, order = ours.state_dict(), sample_keys(list(reference.losses)).argsort()
    for key, values in (("multipliers", reference.multipliers), ("losses", reference.losses)):
        expected = torch.tensor(list(values.values()), dtype=torch.float64)[order]
        torch.testing.assert_close(state[key], expected, rtol=1e-12, atol=1e-12)
    assert len(ours) == len(reference.losses) > 35


class TestStep:
    def test_by_hand(self):
        multipliers, losses = torch.tensor([1.0, 1.0, 0.1, 0.0]), torch.tensor([0.5, 0.1, 0.1, 0.3])
        assert dual_ascent(multipliers, losses, 0.3, 1.0).tolist() == pytest.approx([1.2, 0.8, 0.0, 0.0])
        found = dual_ascent(multipliers, losses, 0.3, 0.5, alpha=2.0)
        assert found.tolist() == pytest.approx([0.85, 0.65, 0.0, 0.0])

    @pytest.mark.parametrize("alpha, eta", [(1.0, 1.0), (0.5, 0.2), (3.0, 1.0), (1.0, 1.8)])
    def test_resilient_multipliers_settle_at_alpha_times_the_excess(self, alpha, eta):
        losses = torch.tensor([0.0, 0.3, 0.31, 0.9, 7.0], dtype=torch.float64)
        multipliers = torch.ones(5, dtype=torch.float64)
        for _ in range(400):
            multipliers = dual_ascent(multipliers, losses, 0.3, eta, alpha)
        torch.testing.assert_close(multipliers, alpha * (losses - 0.3).clamp(min=0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            dual_ascent(multipliers, losses, 0.3, eta, alpha), multipliers, rtol=1e-9, atol=1e-9
        )

    def test_eta_equal_to_alpha_forgets(self):
        for before in (0.0, 1.0, 50.0):
            after = dual_ascent(torch.tensor([before]), torch.tensor([0.9]), 0.3, 2.0, 2.0)
            assert after.item() == pytest.approx(2.0 * 0.6, rel=1e-5)

    def test_no_gradient_reaches_the_losses(self):
        losses = torch.tensor([0.5], requires_grad=True)
        assert not dual_ascent(torch.tensor([1.0]), losses, 0.3, 1.0).requires_grad


def descend(multipliers, constraints, objective, theta, steps=3000, rate=0.03):
    """Gradient descent on `objective + sum lambda_i l_i`, weights as they were before each update."""
    keys = sample_keys(list(range(len(constraints(torch.tensor(theta))))))
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        losses = constraints(theta)
        total = objective(theta) + (multipliers.weights(keys) * losses).sum()
        (gradient,) = torch.autograd.grad(total, theta)
        multipliers.update(keys, losses)
        theta = (theta - rate * gradient).detach().requires_grad_()
    return theta.item(), multipliers.weights(keys).tolist()


class TestKnownProblems:
    def test_plain_finds_the_multipliers_of_a_quadratic_program(self):
        """Least `x^2 / 2` with `1 - x <= 0`, `x - 3 <= 0`, written as losses with bound 0.3: `x = 1` and multipliers 1, 0."""
        ours = Multipliers(epsilon=0.3, eta=0.03)
        x, found = descend(ours, lambda x: torch.stack([1.3 - x, x - 2.7]), lambda x: x**2 / 2, 5.0)
        assert x == pytest.approx(1.0, abs=1e-4)
        assert found == pytest.approx([1.0, 0.0], abs=1e-4)

    def test_resilient_shares_what_cannot_be_kept(self):
        """`2x + 1 <= 0`, `1 - x <= 0` and `x - 5 <= 0` have no solution; least squares of the slacks is at x = -0.2."""
        ours = Multipliers(epsilon=0.0, eta=0.03, alpha=2.0)
        x, found = descend(ours, lambda x: torch.stack([2 * x + 1, 1 - x, x - 5]), lambda x: 0 * x, 3.0)
        assert x == pytest.approx(-0.2, abs=1e-4)
        assert found == pytest.approx([2 * 0.6, 2 * 1.2, 0.0], abs=1e-3)


class TestUpdate:
    def test_weights_are_those_before_it_and_looking_changes_nothing(self):
        ours = Multipliers(epsilon=0.0)
        keys = sample_keys(["a", "b"])
        assert ours.weights(keys).tolist() == [1.0, 1.0] and ours.weights(keys).dtype == torch.float32
        assert len(ours) == 0 and ours.report() == {}
        ours.update(keys, torch.tensor([1.0, 2.0]))
        before = ours.state_dict()
        assert ours.weights(sample_keys(["b", "new", "a", "a"])).tolist() == [3.0, 1.0, 2.0, 2.0]
        ours.report()
        assert same(ours.state_dict(), before)

    def test_processes_and_order_do_not_matter(self):
        """The same pairs, gathered from other processes in another order, bit for bit."""
        first, second = Multipliers(**WAYS["resilient"]), Multipliers(**WAYS["resilient"])
        for names, losses in batches(1, steps=20, samples=6):
            updated(first, names, losses)
            pairs = random.Random(len(second)).sample(list(zip(names, losses)), len(names))
            updated(second, *map(list, zip(*pairs)))
        assert same(first.state_dict(), second.state_dict())

    def test_a_sample_twice_in_a_batch_steps_once(self):
        ours = Multipliers(epsilon=0.0, eta=1.0)
        updated(ours, ["a", "b", "a"], [1.0, 5.0, 2.0])
        assert ours.weights(sample_keys(["a", "b"])).tolist() == [2.5, 6.0]

    def test_a_loss_that_is_not_finite_is_passed_over(self, caplog):
        ours = Multipliers(epsilon=0.0)
        for _ in range(2):
            updated(ours, ["a", "b", "c", "a"], [math.nan, math.inf, 1.0, 3.0])
        assert ours.weights(sample_keys(["a", "b", "c"])).tolist() == [7.0, 1.0, 3.0]
        assert [record.getMessage() for record in caplog.records] == [
            "A loss is nan: the multiplier of its sample stays as it is."
        ]

    def test_nothing_and_16_bits(self):
        ours = Multipliers(epsilon=0.0)
        updated(ours, [], [])
        assert len(ours) == 0
        ours.update(sample_keys([3]), torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True))
        assert ours.weights(sample_keys(["3"])).tolist() == [1.5]

    def test_more_samples_than_there_is_room_for(self):
        ours = Multipliers(epsilon=0.0)
        for first in range(0, 5000, 700):
            keys = sample_keys(list(range(first, first + 700)))
            ours.update(keys, torch.arange(first, first + 700))
        expected = torch.arange(5600) + 1.0
        assert torch.equal(ours.weights(sample_keys(list(range(5600)))), expected)

    @pytest.mark.parametrize(
        "keys, losses, message",
        [
            (torch.tensor([1, 2]), torch.tensor([1.0]), "1 losses for 2 samples"),
            (torch.tensor([1.0]), torch.tensor([1.0]), "keys must be a tensor of int64"),
            (torch.tensor([[1]]), torch.tensor([1.0]), r"keys must be .* got torch.int64 \(1, 1\)"),
            (torch.tensor([1]), torch.tensor([[1.0]]), r"losses must be .* \(1, 1\)"),
        ],
    )
    def test_bad_batches_change_nothing(self, keys, losses, message):
        ours = Multipliers(epsilon=0.0)
        with pytest.raises(InputError, match=message):
            ours.update(keys, losses)
        assert len(ours) == 0

    def test_bad_ids(self):
        with pytest.raises(InputError, match="Entry 1 of the sample ids is None"):
            sample_keys(["a", None])


class TestState:
    @every_way
    def test_a_run_stopped_half_way_goes_on_bit_for_bit(self, way, tmp_path):
        straight, stopped = Multipliers(**WAYS[way]), Multipliers(**WAYS[way])
        steps = list(batches(2, steps=30))
        for step in steps[:15]:
            updated(straight, *step)
            updated(stopped, *step)
        save_state(tmp_path / "state.safetensors", stopped.state_dict())
        resumed = Multipliers(**WAYS[way])
        updated(resumed, ["other"], [9.0])  # what was there before is replaced
        resumed.load_state_dict(load_state(tmp_path / "state.safetensors"))
        assert same(resumed.state_dict(), stopped.state_dict())
        for step in steps[15:]:
            updated(straight, *step)
            updated(resumed, *step)
        assert same(resumed.state_dict(), straight.state_dict())
        assert resumed.report() == straight.report()

    def test_an_empty_one(self):
        ours = Multipliers(epsilon=0.0)
        ours.load_state_dict(Multipliers(epsilon=0.0).state_dict())
        updated(ours, ["a"], [1.0])
        assert ours.weights(sample_keys(["a"])).tolist() == [2.0]

    def test_it_is_a_copy(self):
        ours = Multipliers(epsilon=0.0)
        updated(ours, ["a"], [1.0])
        state = ours.state_dict()
        updated(ours, ["a"], [1.0])
        assert state["multipliers"].tolist() == [2.0]

    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("version", torch.tensor(2), "in format 2"),
            ("version", None, "damaged"),
            ("keys", None, "damaged"),
            ("keys", torch.tensor([2, 1]), "keys are not ascending"),
            ("keys", torch.tensor([1.0, 2.0]), "keys are not ascending"),
            ("multipliers", [1.0, 2.0], "damaged"),
            ("multipliers", torch.tensor([1.0, -1.0], dtype=torch.float64), "negative"),
            ("multipliers", torch.tensor([1.0, math.nan], dtype=torch.float64), "multipliers are not"),
            ("multipliers", torch.tensor([1.0, 2.0]), "multipliers are not"),
            ("losses", torch.tensor([1.0], dtype=torch.float64), "losses are not"),
        ],
    )
    def test_a_damaged_one_is_refused_and_changes_nothing(self, key, value, message):
        ours, other = Multipliers(epsilon=0.0), Multipliers(epsilon=0.0)
        updated(ours, ["a"], [1.0])
        updated(other, ["a", "b"], [1.0, 2.0])
        state, before = other.state_dict(), ours.state_dict()
        if value is None:
            del state[key]
        else:
            state[key] = value
        with pytest.raises(InputError, match=message):
            ours.load_state_dict(state)
        assert same(ours.state_dict(), before)


class TestReport:
    def test_by_hand(self):
        losses = torch.tensor([0.1, 4.0, 0.3, 2.0, 0.2])
        found = tail_report(losses, epsilon=0.3, tail=0.3)
        # The worst 1.5 of 5: 4 and half of 2.
        assert found == pytest.approx(
            {"satisfied": 0.6, "loss_mean": 1.32, "loss_max": 4.0, "loss_cvar": (4 + 0.5 * 2) / 1.5}
        )
        assert tail_report(losses, 0.3, tail=1.0)["loss_cvar"] == pytest.approx(1.32)
        assert tail_report(losses, 0.3, tail=0.01)["loss_cvar"] == 4.0
        assert tail_report(torch.zeros(0), 0.3) == {}

    @pytest.mark.parametrize("tail", [0.05, 0.1, 0.29, 0.5, 0.731])
    def test_cvar_is_rockafellar_and_uryasevs(self, tail):
        """The least over `c` of `c + mean(max(0, l - c)) / tail`, which is taken at one of the losses."""
        losses = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        least = min((c + (losses - c).clamp(min=0).mean() / tail).item() for c in losses)
        assert tail_report(losses, 0.0, tail)["loss_cvar"] == pytest.approx(least, rel=1e-12)

    def test_an_infinite_loss_is_in_the_tail(self):
        found = tail_report(torch.tensor([math.inf, 0.1, -math.inf]), 0.3, tail=0.3)
        assert found["loss_max"] == found["loss_cvar"] == math.inf and found["satisfied"] == pytest.approx(2 / 3)

    def test_of_multipliers(self):
        ours = Multipliers(epsilon=0.5, eta=1.0)
        updated(ours, ["a", "b", "c"], [0.1, 3.0, 0.5])
        updated(ours, ["a", "a"], [0.0, 0.0])
        updated(ours, ["a"], [0.2])
        found = ours.report(tail=0.5)
        assert found == pytest.approx(
            {
                "satisfied": 2 / 3,
                "loss_mean": (0.2 + 3.0 + 0.5) / 3,
                "loss_max": 3.0,
                "loss_cvar": (3.0 + 0.5 * 0.5) / 1.5,
                "samples": 3.0,
                "multiplier_mean": (0.0 + 3.5 + 1.0) / 3,
                "multiplier_max": 3.5,
                "multiplier_zero": 1 / 3,
            }
        )

    def test_eta_zero_is_erm(self):
        ours = Multipliers(epsilon=0.5, eta=0.0, alpha=1.0)
        updated(ours, ["a", "b"], [9.0, 0.1])
        assert ours.weights(sample_keys(["a", "b", "c"])).tolist() == [1.0, 1.0, 1.0]
        assert ours.report()["loss_max"] == 9.0

    def test_bad_tail(self):
        for tail in (0.0, 1.5, math.nan, True):
            with pytest.raises(InputError, match="tail must be a share"):
                tail_report(torch.zeros(3), 0.3, tail)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"epsilon": math.nan}, "epsilon must be a finite number, got nan"),
        ({"epsilon": "0.3"}, "epsilon must be a finite number"),
        ({"epsilon": None}, "epsilon must be a finite number"),
        ({"epsilon": True}, "epsilon must be a finite number"),
        ({"epsilon": 0.3, "eta": -1.0}, "eta must be a finite number of at least 0"),
        ({"epsilon": 0.3, "eta": math.inf}, "eta must be a finite number of at least 0"),
        ({"epsilon": 0.3, "alpha": 0.0}, "alpha must be a positive finite number"),
        ({"epsilon": 0.3, "alpha": math.inf}, "alpha must be a positive finite number"),
        ({"epsilon": 0.3, "initial": -0.1}, "initial must be a finite number of at least 0"),
        ({"epsilon": 0.3, "eta": 1.0, "alpha": 0.5}, r"eta \(1.0\) must be less than twice alpha \(0.5\)"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(InputError, match=f"feasible: {message}"):
        Multipliers(**arguments)
