"""Advantages and surrogate losses of groups of any size: torch in, torch out."""

import torch


def grouped_advantages(
    rewards_per_func: torch.Tensor,
    reward_weights: torch.Tensor,
    group_ids: torch.Tensor,
    scale_rewards: str = "group",
    aggregation: str = "sum_then_normalize",
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO's advantages where groups have different sizes: `A_i = (r_i - mean_group r) / (std r + 1e-4)`.

    With groups of one size these are TRL's. On the CPU, where sums are in one order. The standard deviation has Bessel's correction; a completion without any score
    gets advantage 0 and is left out of mean and deviation, and so is a function without a score from that function's.

    Args:
        rewards_per_func (`torch.Tensor` of shape `(N, F)`):
            What each reward function returned, NaN where it returned `None`.
        reward_weights (`torch.Tensor` of shape `(F,)`):
            Weights of the functions.
        group_ids (`torch.Tensor` of shape `(N,)`, int64):
            Group of each completion, counted from 0.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`, `"batch"` or `"none"`: whose deviation divides. Not used by `"normalize_then_sum"`.
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            Or `"normalize_then_sum"`: each function is normalised in its group, the weighted sum over the batch.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(N,)`: advantages, in the dtype of the rewards, and whether the deviation that
        TRL reports as `frac_reward_zero_std` is 0.
    """
    scores = rewards_per_func.double()
    weights = reward_weights.double()
    unscorable = scores.isnan().all(1)
    if aggregation == "normalize_then_sum":
        normalised = [_centred(column, group_ids, scaled=True)[0] for column in scores.unbind(1)]
        total = (torch.stack(normalised, 1) * weights).nansum(1).masked_fill(unscorable, torch.nan)
        advantages, std = _centred(total, torch.zeros_like(group_ids), scaled=True)
    else:
        total = (scores * weights).nansum(1).masked_fill(unscorable, torch.nan)
        advantages, std = _centred(total, group_ids, scaled=scale_rewards == "group")
        if scale_rewards == "batch":
            std = _moments(total, torch.zeros_like(group_ids))[1]
            advantages = advantages / (std + 1e-4)
    is_std_zero = torch.isclose(std, torch.zeros_like(std))
    return torch.nan_to_num(advantages, nan=0.0).to(rewards_per_func.dtype), is_std_zero


def _centred(values: torch.Tensor, group_ids: torch.Tensor, scaled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = _moments(values, group_ids)
    centred = values - mean
    return (centred / (std + 1e-4) if scaled else centred), std


def _moments(values: torch.Tensor, group_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each value's group, `(N,)` each, without NaN values; deviation NaN for groups of one."""
    known = ~values.isnan()
    count = torch.bincount(group_ids, known.double())
    mean = (torch.bincount(group_ids, values.nan_to_num()) / count)[group_ids]
    squares = torch.bincount(group_ids, ((values - mean) ** 2).nan_to_num())
    variance = squares / torch.where(count > 1, count - 1, torch.nan)
    return mean, variance.sqrt()[group_ids]


def group_sums(values: torch.Tensor, group_ids: torch.Tensor, size: int) -> torch.Tensor:
    """Sum of the values `(N,)` of each of `size` groups, `(size,)`; a group of -1 is none."""
    # One place more, at the end, takes what is in no group: an index of -1 would be refused.
    sums = torch.zeros(size + 1, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, torch.where(group_ids < 0, size, group_ids), values)[:size]


def mean_surrogate_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon_low: float,
    epsilon_high: float,
) -> torch.Tensor:
    """PPO's clipped surrogate as a loss, averaged over the tokens of each sequence.

    `l_i = -(1 / L_i) sum_t min(r_it A_i, clip(r_it, 1 - epsilon_low, 1 + epsilon_high) A_i)` with
    `r_it = exp(logps_it - old_logps_it)`. At `r = 1` it is `-A_i`, and its mean over a group is 0.

    Args:
        logps, old_logps, mask (`torch.Tensor` of shape `(B, T)`):
            Log-probabilities (nats) now and at generation, and 1 at loss-bearing tokens.
        advantages (`torch.Tensor` of shape `(B,)`):
            Advantages without any weight.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32: 0 for a sequence without tokens.
    """
    ratio = (logps - old_logps).float().exp()
    advantages = advantages.float()[:, None]
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantages)
    return -torch.where(mask.bool(), gain, 0.0).sum(1) / mask.sum(1).clamp(min=1)
