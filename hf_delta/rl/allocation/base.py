"""What an allocation rule sees and what it returns."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from hf_delta.rl.difficulty import PassRates


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one generation batch, before their rollouts: `P` entries in sampler order, identical on every rank, on CPU.

    Args:
        prompt_ids (`list[str]`):
            Stable id of each prompt. A prompt that the sampler drew twice stands here twice.
        rates ([`~hf_delta.rl.difficulty.PassRates`]):
            What is known about their pass rates.
        groups (`torch.Tensor` of shape `(P,)`, int64):
            Difficulty group of each prompt, counted from 0; -1 for none.
        num_groups (`int`):
            Groups there are so far; a stream of data may add some during a run.
        budget (`int`):
            Rollouts of the whole batch, which is `num_generations * P`.
    """

    prompt_ids: list[str]
    rates: PassRates
    groups: torch.Tensor
    num_groups: int
    budget: int

    @property
    def mean(self) -> float:
        """Rollouts per prompt."""
        return self.budget / len(self)

    def __len__(self) -> int:
        return len(self.prompt_ids)


@runtime_checkable
class AllocationRule(Protocol):
    """A callable from a [`PromptBatch`] to rollouts `(P,)`, int64: each at least 2, together exactly `batch.budget`.

    It must be a function of the batch and of its own state only, so that every rank gets the same.

    A rule may also have
        `check(budget, prompts)`: raises `InputError` if batches of `prompts` prompts cannot be given `budget` rollouts;
            called before training;
        `update(batch, counts, correct)`: called once the rollouts of the batch are scored, with tensors `(P,)`: the scored
            rollouts of each prompt, and how many of them are correct;
        `log_metrics()`: numbers by name, for the log line of the step;
        `state_dict()` and `load_state_dict(state)`: what it learns on the way, as nested dicts and lists of tensors,
            numbers and strings. It is written into every checkpoint and read back on resume.
    """

    def __call__(self, batch: PromptBatch) -> torch.Tensor: ...
