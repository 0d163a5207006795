"""Losses of pairs: scores of the chosen and the rejected completion in, one loss a pair out; torch only.

Scores are what [`completion_scores`] gives, or TRL's `logps - ref_logps`: nats, not yet multiplied by `beta`. Every loss is

    loss(chosen_scores (B,), rejected_scores (B,), beta, **options) -> (B,)

in the dtype of the scores, in the order of operations of TRL's `DPOTrainer`, so that equal scores give equal losses bit for bit.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid

from hf_delta.preference.weights.base import TokenTerms


def completion_scores(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    kl: torch.Tensor | None,
    terms: TokenTerms,
    mask: torch.Tensor,
    constant_chosen_kl: bool = False,
) -> torch.Tensor:
    """Score of each completion: `sum_t w_t log pi_t - sum_t w_t log pi_ref,t + sum_t v_t KL(pi_ref || pi)_t`.

    The second half of that is the KL term, which is left out where `terms.kl` is `None`. With all `w_t = 1` and no KL term it is
    `logps.sum(1) - ref_logps.sum(1)`, bit for bit. What stands outside of the mask, NaN included, changes nothing.

    Args:
        logps (`torch.Tensor` of shape `(N, T)`): Log-probabilities of the policy, nats; first all chosen, then all rejected.
        ref_logps (`torch.Tensor` of shape `(N, T)`): Those of the reference.
        kl (`torch.Tensor` of shape `(N, T)`, *optional*): `KL(pi_ref || pi)` of every token, nats.
        terms (`TokenTerms`): Weights, `(N, T)` each.
        mask (`torch.Tensor` of shape `(N, T)`, bool): Where a token belongs to the completion.
        constant_chosen_kl (`bool`, *optional*, defaults to `False`): Whether no gradient flows through the KL of chosen ones.

    Returns:
        `(N,)`.
    """
    mask = mask.bool()
    # Both sides of a product are cleared, or the gradient of the other one would be 0 times what stands there.
    weights = torch.where(mask, terms.reward, 0.0)
    policy, reference = torch.where(mask, logps, 0.0), torch.where(mask, ref_logps, 0.0)
    # Summed before the difference is taken, as TRL does.
    scores = (weights * policy).sum(1) - (weights * reference).sum(1)
    if terms.kl is None:
        return scores
    if kl is None:
        raise ValueError("these weights have a KL term, and no KL was given")
    kl = torch.where(mask, kl, 0.0)
    if constant_chosen_kl:
        chosen, rejected = kl.chunk(2)
        kl = torch.cat([chosen.detach(), rejected])
    return scores + (torch.where(mask, terms.kl, 0.0) * kl).sum(1)


def sigmoid(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO: `-log sigmoid(beta (s_c - s_r))`, `(B,)`.

    Direct Preference Optimization (https://huggingface.co/papers/2305.18290).
    """
    return -logsigmoid(beta * (chosen_scores - rejected_scores))


def hinge(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, beta: float) -> torch.Tensor:
    """SLiC: `max(0, 1 - beta (s_c - s_r))`, `(B,)`.

    SLiC-HF (https://huggingface.co/papers/2305.10425).
    """
    return torch.relu(1 - beta * (chosen_scores - rejected_scores))


def ipo(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    beta: float,
    *,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
) -> torch.Tensor:
    """IPO: `(s_c / |y_c| - s_r / |y_r| - 1 / (2 beta))^2`, `(B,)`; scores are averaged over tokens, as TRL does.

    A General Theoretical Paradigm to Understand Learning from Human Preferences (https://huggingface.co/papers/2310.12036).

    Args:
        chosen_scores (`torch.Tensor` of shape `(B,)`): Scores of the chosen completions, nats.
        rejected_scores (`torch.Tensor` of shape `(B,)`): Scores of the rejected ones.
        beta (`float`): TRL's `beta`, the paper's `tau`.
        chosen_lengths (`torch.Tensor` of shape `(B,)`): Tokens in the chosen completions.
        rejected_lengths (`torch.Tensor` of shape `(B,)`): Tokens in the rejected ones.
    """
    delta = _averaged(chosen_scores, chosen_lengths) - _averaged(rejected_scores, rejected_lengths)
    return (delta - 1 / (2 * beta)) ** 2


def sigmoid_norm(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    beta: float,
    *,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
) -> torch.Tensor:
    """DPO with scores averaged over tokens: `-log sigmoid(beta (s_c / |y_c| - s_r / |y_r|))`, `(B,)`.

    Its `beta` is of the order of 5 to 10. Arguments are those of [`ipo`].

    Tulu 3 (https://huggingface.co/papers/2411.15124).
    """
    delta = _averaged(chosen_scores, chosen_lengths) - _averaged(rejected_scores, rejected_lengths)
    return -logsigmoid(beta * delta)


def robust(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, beta: float, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """DPO for labels that are swapped with probability `e`, an unbiased estimate of the loss without swaps, `(B,)`.

    `(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)` with `d = s_c - s_r` and `e = label_smoothing < 1/2`.

    Provably Robust DPO (https://huggingface.co/papers/2403.00409).
    """
    delta = chosen_scores - rejected_scores
    clean = -(1 - label_smoothing) * logsigmoid(beta * delta)
    flipped = -label_smoothing * logsigmoid(-beta * delta)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def _averaged(scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return scores / lengths.clamp(min=1.0)


PAIR_LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "robust": robust,
}
