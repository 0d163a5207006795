"""The controller `exp3` of Rollout-GDRO: a bandit per difficulty group over numbers of rollouts, with a price per rollout."""

import math
from typing import Any

import torch

from hf_delta.errors import InputError
from hf_delta.rl.allocation.base import PromptBatch
from hf_delta.rl.allocation.budget import nearest_budget


# Rounds over which the reference of a group's losses is averaged.
_MEMORY = 20


class Exp3Controller:
    """Each group present draws a number of rollouts `n` for its prompts by EXP3, and a price keeps the mean at the budget.

    The loss of arm `n` for group `b` in one batch, with `m` the mean number of rollouts of the budget, is

        L_b(n) = v_b m / n + price n / m,        v_b = mean of c (n' - c) / (n' (n' - 1)) over its prompts,

    `c` correct of `n'` rollouts. `v_b` is unbiased for the mean of `p (1 - p)` whatever `n'` was. Arms are drawn with
    `q_b(n) = (1 - gamma) softmax(-eta S_b)(n) + gamma / A`, `S_b` the sum of the losses. The price part of the loss is known
    for every arm. The variance part counts as seen for the drawn arm only, minus the running mean of the group's and divided
    by the arm's probability, so that its expectation is that of the loss up to a constant. After each batch

        price <- price + price_rate (mean over prompts of the n asked for - m) / m.

    What was asked for is moved to the exact budget by [`nearest_budget`]. In the released code of "Group Distributionally
    Robust Optimization-Driven Reinforcement Learning for LLM Reasoning" (arXiv 2601.19280) the price moves on the rollouts
    after that, where the difference is always 0; the groups are those of the prompts of the batch before, by place; the scores are not divided by
    probabilities; and the signal is the mean surrogate loss, which is 0 for every complete group on the policy that sampled
    it. The loss here is the paper's, `-utility + price n`, for the utility `-v_b / n` of its theorem 4.2, in units in which
    the price does not depend on `num_generations`. A number of rollouts that is not tried could be judged as well from `v_b`,
    which is what the controller `variance` does: this one is here for comparison. Prompts without a group ask for the mean.

    Args:
        eta (`float`, *optional*, defaults to `0.3`):
            Learning rate of the arms, positive.
        gamma (`float`, *optional*, defaults to `0.05`):
            Share of draws that are uniform over the arms, in (0, 1].
        price_rate (`float`, *optional*, defaults to `0.02`):
            Learning rate of the price, not negative.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws, which have a generator of their own.

    Raises:
        `InputError`: a setting is out of range.
    """

    def __init__(self, eta: float = 0.3, gamma: float = 0.05, price_rate: float = 0.02, seed: int = 0):
        _check("eta", eta, 0 < _number(eta) < math.inf, "be positive")
        _check("gamma", gamma, 0 < _number(gamma) <= 1, "lie in (0, 1]")
        _check("price_rate", price_rate, 0 <= _number(price_rate) < math.inf, "be 0 or positive")
        _check("seed", seed, isinstance(seed, int) and not isinstance(seed, bool), "be a whole number")
        self.eta, self.gamma, self.price_rate = eta, gamma, price_rate
        self.price = 0.0
        self.scores = torch.zeros(0, 0, dtype=torch.float64)
        self.reference = torch.zeros(0, dtype=torch.float64)
        self.rounds = torch.zeros(0, dtype=torch.int64)
        self.drawn = torch.zeros(0, dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: PromptBatch, allowed: range) -> torch.Tensor:
        self._make_room(batch.num_groups, len(allowed))
        if batch.num_groups:
            self.drawn = torch.multinomial(self.probabilities(), 1, generator=self.generator).squeeze(1)
        return nearest_budget(self._asked(batch, allowed), batch.budget, allowed[0], allowed[-1], batch.prompt_ids)

    def update(self, batch: PromptBatch, allowed: range, counts: torch.Tensor, correct: torch.Tensor) -> None:
        """Learn from the batch that was allocated last: arms from its outcomes, the price from what was asked for."""
        present, variance = _variance_by_group(batch, counts, correct)
        arms = torch.tensor(allowed, dtype=torch.float64)
        drawn = self.drawn[present]
        loss = variance * batch.mean / arms[drawn]
        weight = 1 / self.probabilities()[present, drawn]
        self.scores[present] += self.price * arms / batch.mean
        self.scores[present, drawn] += weight * (loss - self.reference[present])
        self.rounds[present] += 1
        self.reference[present] += (loss - self.reference[present]) / self.rounds[present].clamp(max=_MEMORY)
        self.price += self.price_rate * (self._asked(batch, allowed).mean().item() / batch.mean - 1)

    def probabilities(self) -> torch.Tensor:
        """Probability of each arm in each group, `(K, A)`."""
        return (1 - self.gamma) * torch.softmax(-self.eta * self.scores, dim=1) + self.gamma / self.scores.shape[1]

    def log_metrics(self) -> dict[str, float]:
        return {"gdro/price": self.price}

    def state_dict(self) -> dict[str, Any]:
        tensors = {name: getattr(self, name).clone() for name in ("scores", "reference", "rounds", "drawn")}
        return {"price": self.price, "generator": self.generator.get_state(), **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.price = float(state["price"])
        self.generator.set_state(state["generator"])
        for name in ("scores", "reference", "rounds", "drawn"):
            setattr(self, name, state[name].clone())

    def _asked(self, batch: PromptBatch, allowed: range) -> torch.Tensor:
        """What each prompt's group drew, `(P,)`, before the budget."""
        asked = torch.full((len(batch),), batch.mean, dtype=torch.float64)
        grouped = batch.groups >= 0
        asked[grouped] = torch.tensor(allowed, dtype=torch.float64)[self.drawn[batch.groups[grouped]]]
        return asked

    def _make_room(self, groups: int, arms: int) -> None:
        known = len(self.scores)
        if known and self.scores.shape[1] != arms:
            raise InputError(
                f"rollout_gdro: the bandits have learnt about {self.scores.shape[1]} numbers of rollouts, and n_min to n_max "
                f"are now {arms}. Go on with the n_min, n_max and num_generations that the run was started with."
            )
        if groups > known or not known:
            scores = torch.zeros(groups, arms, dtype=torch.float64)
            scores[:known] = self.scores if known else 0.0
            self.scores = scores
            self.reference = torch.cat([self.reference, self.reference.new_zeros(groups - known)])
            self.rounds = torch.cat([self.rounds, self.rounds.new_zeros(groups - known)])


def _variance_by_group(
    batch: PromptBatch, counts: torch.Tensor, correct: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of which a prompt has two scored rollouts, and the mean of their unbiased `p (1 - p)`."""
    usable = (batch.groups >= 0) & (counts >= 2)
    n, c = counts[usable].double(), correct[usable].double()
    variance = c * (n - c) / (n * (n - 1))
    groups = batch.groups[usable]
    total = torch.zeros(batch.num_groups, dtype=torch.float64).index_add_(0, groups, variance)
    prompts = torch.bincount(groups, minlength=batch.num_groups)
    present = prompts.nonzero().squeeze(1)
    return present, total[present] / prompts[present]


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _check(key: str, value: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise InputError(f"{key} must {rule}, got {value!r}.")
