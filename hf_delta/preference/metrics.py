"""What is logged of a batch: sums and counts of this process, added up over all of them in one go."""

from typing import NamedTuple

import torch

from hf_delta.preference.weights import TokenTerms


class Share(NamedTuple):
    """A mean to be: sum and count, scalars, of this process."""

    total: torch.Tensor
    count: torch.Tensor


def mean_of(values: torch.Tensor, where: torch.Tensor | None = None) -> Share:
    """Mean of values, or of those `where` a mask of the same shape is set."""
    values = values.detach().float()
    if where is None:
        return Share(values.sum(), values.new_tensor(values.numel()))
    return Share((values * where).sum(), where.sum().float())


def pair_metrics(
    rewards: torch.Tensor, logps: torch.Tensor, kl: torch.Tensor | None, mask: torch.Tensor, statistics: dict
) -> dict[str, Share]:
    """TRL's metrics of a batch of pairs, and the KL of completions where there is one.

    Args:
        rewards (`torch.Tensor` of shape `(2B,)`): `beta` times the scores, first all chosen, then all rejected.
        logps (`torch.Tensor` of shape `(2B, T)`): Log-probabilities of tokens under the policy.
        kl (`torch.Tensor` of shape `(2B, T)`, *optional*): KL to the reference.
        mask (`torch.Tensor` of shape `(2B, T)`): Where tokens belong to completions.
        statistics (`dict[str, torch.Tensor]`): `entropy`, `mean_logits` and `is_top1`, `(2B, T)` each.
    """
    chosen, rejected = rewards.detach().chunk(2)
    found = {
        "entropy": mean_of(statistics["entropy"], mask),
        "mean_token_accuracy": mean_of(statistics["is_top1"].chunk(2)[0], mask.chunk(2)[0]),
        "rewards/chosen": mean_of(chosen),
        "rewards/rejected": mean_of(rejected),
        "rewards/accuracies": mean_of(chosen > rejected),
        "rewards/margins": mean_of(chosen - rejected),
    }
    halves = ("chosen", "rejected")
    for side, sums, logits, there in zip(
        halves, logps.sum(1).chunk(2), statistics["mean_logits"].chunk(2), mask.chunk(2)
    ):
        found |= {f"logps/{side}": mean_of(sums), f"logits/{side}": mean_of(logits, there)}
    if kl is not None:
        found |= {f"kl/{side}": mean_of(sums) for side, sums in zip(halves, kl.sum(1).chunk(2))}
    return found


def list_metrics(
    rewards: torch.Tensor, labels: torch.Tensor, there: torch.Tensor, mask: torch.Tensor, statistics: dict
) -> dict[str, Share]:
    """Metrics of a batch of lists: pairs with different labels in the right order, best and worst.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`): `beta` times the scores.
        labels (`torch.Tensor` of shape `(B, K)`): How good completions are.
        there (`torch.Tensor` of shape `(B, K)`, bool): Which entries are completions.
        mask (`torch.Tensor` of shape `(N, T)`): Where tokens belong to completions.
        statistics (`dict[str, torch.Tensor]`): `entropy`, `(N, T)`.
    """
    rewards = rewards.detach().masked_fill(~there, 0.0)
    better = (labels[:, :, None] > labels[:, None, :]) & there[:, :, None] & there[:, None, :]
    best = rewards.gather(1, labels.masked_fill(~there, -torch.inf).argmax(1, keepdim=True))
    worst = rewards.gather(1, labels.masked_fill(~there, torch.inf).argmin(1, keepdim=True))
    return {
        "entropy": mean_of(statistics["entropy"], mask),
        "rewards/best": mean_of(best),
        "rewards/worst": mean_of(worst),
        "rewards/margins": mean_of(best - worst),
        "rewards/accuracies": mean_of(rewards[:, :, None] > rewards[:, None, :], better),
    }


def mask_metrics(terms: TokenTerms, mask: torch.Tensor) -> dict[str, Share]:
    """Mean of token weights, and the share of them that is exactly 0."""
    found = {}
    for name, weights in {"reward": terms.reward, "kl": terms.kl}.items():
        if weights is not None:
            found |= {
                f"weights/{name}_mean": mean_of(weights, mask),
                f"weights/{name}_zero": mean_of(weights == 0, mask),
            }
    return found


def means(shares: dict[str, Share], gather) -> dict[str, float]:
    """Means over all processes.

    Args:
        gather (`Callable`): Of accelerate: from a tensor of this process to those of all, one after the other.
    """
    local = torch.stack([torch.stack(share) for share in shares.values()])
    total = gather(local[None]).double().sum(0)
    return {name: (s / n).item() if n > 0 else 0.0 for name, (s, n) in zip(shares, total)}
