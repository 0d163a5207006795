"""Delta-L normalisation: sequences weighted by a negative power of their length."""

import torch

from hf_delta.rl.weights.base import RolloutBatch


def delta_l_weights(lengths: torch.Tensor, alpha: float = 1.0, group_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Weights with mean 1 that fall with length: `w_i = L_i^-alpha / mean_j L_j^-alpha`.

    Dr.GRPO's loss `(1 / (N M)) sum_i sum_t l_it`, with the advantages of sequence `i` multiplied by `w_i`, is the
    estimator `(1 / M) sum_i (L_i^-alpha / sum_j L_j^-alpha) g_i` of "Delta L Normalization" (arXiv 2509.07558), where
    `g_i` is the summed gradient of the tokens of sequence `i` and `M` TRL's `max_completion_length`: minimum variance for `alpha = 1` if the variance of `g_i` grows with `L_i`, and Dr.GRPO itself for `alpha = 0`.

    Args:
        lengths (`torch.Tensor` of shape `(N,)`):
            Loss-bearing tokens of each sequence. Sequences of length 0 get weight 0 and are left out of the mean.
        alpha (`float`, *optional*, defaults to `1.0`):
            Exponent in [0, 1].
        group_ids (`torch.Tensor` of shape `(N,)`, *optional*):
            If given, the mean runs over the sequences of one group instead of the whole batch.

    Returns:
        `torch.Tensor` of shape `(N,)`, float64: weights with mean 1 over the sequences (of each group) with tokens.
    """
    has_tokens = lengths > 0
    powers = torch.where(has_tokens, lengths.clamp(min=1).double() ** -alpha, 0.0)
    groups = torch.zeros_like(lengths) if group_ids is None else group_ids
    size = int(groups.max()) + 1 if len(groups) else 0
    total = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, powers)
    count = torch.zeros(size, dtype=torch.float64).index_add_(0, groups, has_tokens.double())
    # A group without a single token has no mean to divide by, and no weight to divide.
    mean = torch.where(count > 0, total / count.clamp(min=1), 1.0)
    return powers / mean[groups]


class DeltaLWeights:
    """The weight rule behind `loss_type: delta_l`, see [`delta_l_weights`].

    Args:
        alpha (`float`, *optional*, defaults to `1.0`):
            Exponent in [0, 1].
        scope (`str`, *optional*, defaults to `"batch"`):
            `"batch"`: weights have mean 1 over the generation batch of all processes; `"group"`: over each prompt's group.
    """

    paper = ("ΔL Normalization: Rethink Loss Aggregation in RLVR", "2509.07558")

    def __init__(self, alpha: float = 1.0, scope: str = "batch"):
        self.alpha = alpha
        self.scope = scope

    def __call__(self, batch: RolloutBatch) -> torch.Tensor:
        return delta_l_weights(batch.lengths, self.alpha, batch.group_ids if self.scope == "group" else None)
