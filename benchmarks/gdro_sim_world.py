"""The prompts of `gdro_sim.py`, what is known about them, and the allocations that it compares."""

from dataclasses import dataclass

import torch

from hf_delta.rl.allocation import PromptBatch, RolloutGDRO, nearest_budget
from hf_delta.rl.difficulty import Difficulty, PassRates


# Ten bins; half of the prompts lie in the hardest, the other half evenly in the rest.
BINS = torch.tensor([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
SHARES = torch.tensor([0.5] + [0.5 / 9] * 9, dtype=torch.float64)
PROMPTS, BATCH, MEAN, N_MIN, N_MAX = 1024, 64, 4, 2, 12
# With drift, the log odds of a prompt rise over the run by a normal number with this mean and standard deviation.
DRIFT = (2.0, 1.0)
# As many rollouts as make a posterior certain.
CERTAIN = 1e9


class World:
    """`PROMPTS` prompts with their bins, in an order of visits epoch by epoch, the same for every allocation."""

    def __init__(self, seed: int, batches: int, drifting: bool):
        generator = torch.Generator().manual_seed(seed)
        self.bins = torch.multinomial(SHARES, PROMPTS, replacement=True, generator=generator)
        rise = DRIFT[0] + DRIFT[1] * torch.randn(PROMPTS, generator=generator, dtype=torch.float64)
        self.rise = rise if drifting else torch.zeros(PROMPTS, dtype=torch.float64)
        self.batches = batches
        epochs = -(-batches * BATCH // PROMPTS)
        self.order = torch.cat([torch.randperm(PROMPTS, generator=generator) for _ in range(epochs)])

    def prompts(self, step: int) -> torch.Tensor:
        return self.order[step * BATCH : (step + 1) * BATCH]

    def pass_rates(self, step: int, prompts: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.logit(BINS[self.bins[prompts]]) + self.rise[prompts] * step / self.batches)


class Known:
    """Pass rates and bins as they are."""

    num_groups = len(BINS)

    def __init__(self, world: World):
        self.world = world

    def read(self, step: int, prompts: torch.Tensor) -> tuple[PassRates, torch.Tensor]:
        p = self.world.pass_rates(step, prompts)
        rates = PassRates(CERTAIN * p, CERTAIN * (1 - p), torch.full_like(p, CERTAIN), CERTAIN * p)
        return rates, self.world.bins[prompts]

    def update(self, prompts: torch.Tensor, counts: torch.Tensor, correct: torch.Tensor) -> None:
        pass


class Learnt:
    """The posterior and bins that `Difficulty` makes of the rollouts of this very run.

    `pooled`: prompts of one bin pool, as they do where a column of the dataset tells how hard they are.
    """

    def __init__(self, world: World, pooled: bool = False, decay: float | None = None):
        column = "bin" if pooled else None
        self.difficulty = Difficulty(edges=[i / 10 for i in range(1, 10)], decay=decay, prior_column=column)
        self.num_groups = self.difficulty.num_groups
        self.bins = world.bins if pooled else None

    def read(self, step: int, prompts: torch.Tensor) -> tuple[PassRates, torch.Tensor]:
        asked = names(prompts), self._columns(prompts)
        return self.difficulty.estimate(*asked), self.difficulty.groups(*asked)

    def update(self, prompts: torch.Tensor, counts: torch.Tensor, correct: torch.Tensor) -> None:
        self.difficulty.update(names(prompts), correct, counts, self._columns(prompts))

    def _columns(self, prompts: torch.Tensor) -> list[str] | None:
        return None if self.bins is None else names(self.bins[prompts])


def names(prompts: torch.Tensor) -> list[str]:
    return [f"{i:04d}" for i in prompts.tolist()]


class Uniform:
    """`MEAN` rollouts for every prompt."""

    def __call__(self, batch: PromptBatch) -> torch.Tensor:
        return nearest_budget(torch.full((len(batch),), float(MEAN)), batch.budget, N_MIN, N_MAX, batch.prompt_ids)


class ByPosition:
    """The numbers of `variance`, given to the prompts of the batch in another order: that of other prompts' difficulty."""

    def __init__(self, seed: int):
        self.rule = RolloutGDRO(n_min=N_MIN, n_max=N_MAX, exploration=0.0)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: PromptBatch) -> torch.Tensor:
        return self.rule(batch)[torch.randperm(len(batch), generator=self.generator)]


@dataclass
class Outcome:
    """One run of one allocation: sums over prompts, batch by batch."""

    proxy: list[float]
    zero_signal: list[float]
    rollouts_by_bin: torch.Tensor
    visits_by_bin: torch.Tensor
    solved_hard: float


def simulate(world: World, knowledge, rule, seed: int) -> Outcome:
    """Run an allocation through the visits of the world: `sum_i v_i / n_i` and prompts without signal, in expectation.

    Both are expectations over rewards given the allocation, with the true pass rates: a prompt with `n` rollouts gets all
    right or all wrong with probability `p^n + (1 - p)^n`.
    """
    generator = torch.Generator().manual_seed(seed)
    rollouts, visits = torch.zeros(len(BINS)), torch.zeros(len(BINS))
    ever = torch.zeros(PROMPTS, dtype=torch.bool)
    proxy, zero_signal = [], []
    for step in range(world.batches):
        prompts = world.prompts(step)
        p, (rates, groups) = world.pass_rates(step, prompts), knowledge.read(step, prompts)
        batch = PromptBatch(names(prompts), rates, groups, knowledge.num_groups, MEAN * len(prompts))
        counts = rule(batch)
        assert counts.sum() == batch.budget, "allocations are compared at equal numbers of rollouts"
        assert counts.min() >= N_MIN and counts.max() <= N_MAX
        correct = torch.binomial(counts.double(), p, generator=generator).long()
        proxy.append((p * (1 - p) / counts).sum().item())
        zero_signal.append((p**counts + (1 - p) ** counts).mean().item())
        rollouts.index_add_(0, world.bins[prompts], counts.float())
        visits.index_add_(0, world.bins[prompts], torch.ones(len(prompts)))
        ever[prompts[correct > 0]] = True
        if hasattr(rule, "update"):
            rule.update(batch, counts, correct)
        knowledge.update(prompts, counts, correct)
    hard = (world.bins == 0) & torch.isin(torch.arange(PROMPTS), world.order[: BATCH * world.batches])
    return Outcome(proxy, zero_signal, rollouts, visits, ever[hard].float().mean().item())
