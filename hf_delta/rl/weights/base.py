"""What a weight rule sees, what it returns, and how several of them combine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from hf_delta.errors import InputError, said_by


# What a rule gets only if its `needs` names it: fields of a batch, and for `losses` the method `on_losses`.
OPTIONAL_FIELDS = frozenset({"prompt_ids", "logps", "groups", "losses"})


@dataclass(frozen=True)
class RolloutBatch:
    """One generation batch, gathered over all processes: `N` sequences in sampler order, identical on every rank, on CPU.

    Args:
        group_ids (`torch.Tensor` of shape `(N,)`, int64):
            Group of each sequence: sequences of one prompt share a number, counted from 0.
        lengths (`torch.Tensor` of shape `(N,)`, int64):
            Loss-bearing tokens of each sequence, after truncation masking and tool masking; 0 takes no part in the loss.
        rewards (`torch.Tensor` of shape `(N, F)`):
            What each of the `F` reward functions returned; NaN where it returned `None`.
        reward (`torch.Tensor` of shape `(N,)`):
            Sum of `rewards` times `reward_weights`; NaN where no function gave a score.
        advantages (`torch.Tensor` of shape `(N,)`):
            Advantages as TRL computed them, before any weight.
        correct (`torch.Tensor` of shape `(N,)`, bool):
            Whether `reward` (or the function in `correct_reward_func`) is above `correct_threshold`; False where there is
            no score.
        judged (`torch.Tensor` of shape `(N,)`, bool, *optional*):
            Whether there is a score that `correct` follows from. Absent: wherever `reward` is not NaN.
        step (`int`):
            Optimizer steps taken so far.
        prompt_ids (`list[str]`, *optional*):
            Stable id of each sequence's prompt. Present if a rule asks for it (`needs = {"prompt_ids"}`).
        logps (`torch.Tensor` of shape `(N, T)`, *optional*):
            Per-token log-probabilities (nats) under the policy that starts this generation window. Present if a rule
            asks for it (`needs = {"logps"}`) and TRL computed them, which it does for off-policy steps and for vLLM.
        mask (`torch.Tensor` of shape `(N, T)`, *optional*):
            1 at loss-bearing tokens. Present together with `logps`.
        row_weights (`torch.Tensor` of shape `(N,)`, float64, *optional*):
            Weight of each sequence before any rule, where prompts have different numbers of rollouts:
            `num_generations / n_q` under `rollout_weighting: prompt`. Absent: all are 1.
        groups (`torch.Tensor` of shape `(N,)`, int64, *optional*):
            Difficulty group of each sequence's prompt as it was before this batch, counted from 0; -1 for none. Present if a
            rule asks for it (`needs = {"groups"}`).
        group_names (`tuple[str, ...]`):
            Names of the groups, in order; a stream of data may add some during a run.
    """

    group_ids: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    reward: torch.Tensor
    advantages: torch.Tensor
    correct: torch.Tensor
    judged: torch.Tensor | None = None
    step: int = 0
    prompt_ids: list[str] | None = None
    logps: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    groups: torch.Tensor | None = None
    group_names: tuple[str, ...] = ()

    @property
    def num_groups(self) -> int:
        return len(self.group_names)

    def __len__(self) -> int:
        return len(self.lengths)


@runtime_checkable
class AdvantageTransform(Protocol):
    """A weight rule: a callable from a [`RolloutBatch`] to weights `(N,)`, finite and not negative.

    The weight multiplies the sequence's advantage and so, exactly, its policy-gradient term; the KL term and the entropy
    bonus are outside it. It must be a function of the batch and of its own state only, so that every rank gets the same.

    A rule may also have
        `needs` (`frozenset[str]`): optional fields of the batch it reads, out of `"prompt_ids"`, `"logps"` and `"groups"`, or
            `"losses"`;
        `on_losses(sums, counts)`: with `"losses"` in `needs`, called at the end of each generation window with the sum over
            sequences of their mean clipped surrogate loss per difficulty group, `(K,)` float64, and how many there were;
        `log_metrics(batch)`: numbers by name, for the log line of the step;
        `state_dict()` and `load_state_dict(state)`: what it learns on the way, as nested dicts and lists of tensors,
        numbers and strings. It is written into every checkpoint and read back on resume.
    """

    def __call__(self, batch: RolloutBatch) -> torch.Tensor: ...


def transform_name(transform: Any) -> str:
    """Dotted name of a weight rule: of the function itself, or of the object's class."""
    named = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{named.__module__}.{named.__qualname__}"


def combine_weights(transforms: Sequence[AdvantageTransform], batch: RolloutBatch) -> torch.Tensor:
    """Product of the weights of all rules, `w_i = prod_k w_i^(k)`.

    Returns:
        `torch.Tensor` of shape `(N,)`, float32.

    Raises:
        `InputError`: a rule raised, or returned another shape, a negative or a non-finite weight.
    """
    weights = torch.ones(len(batch), dtype=torch.float64)
    for transform in transforms:
        try:
            found = transform(batch)
        except Exception as error:
            raise InputError(f"The advantage transform {transform_name(transform)} raised {said_by(error)}") from error
        weights = weights * _checked(transform, found, len(batch))
    return weights.float()


def _checked(transform: AdvantageTransform, weights: Any, size: int) -> torch.Tensor:
    weights = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if weights.shape != (size,):
        raise InputError(
            f"The advantage transform {transform_name(transform)} returned weights of shape {tuple(weights.shape)}; "
            f"it must return one weight per sequence, shape ({size},)."
        )
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        row = int(torch.nonzero(~torch.isfinite(weights) | (weights < 0))[0])
        raise InputError(
            f"The advantage transform {transform_name(transform)} returned the weight {weights[row].item()} for sequence "
            f"{row} of the batch; weights must be finite and not negative."
        )
    return weights
