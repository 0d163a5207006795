"""MaPO: masks out of the reference's activations, nothing learned."""

from collections.abc import Sequence

import torch

from hf_delta.errors import InputError
from hf_delta.preference.weights.activations import KINDS
from hf_delta.preference.weights.base import TokenBatch, TokenTerms, TokenWeights
from hf_delta.preference.weights.sparse import PAPER


class MaPOWeights(TokenWeights):
    """One mask in [0, 1] for rewards and KL: `m_t = mean_kinds mean_layers minmax_t(mean_features a_t)`.

    `minmax` takes the smallest value in a completion to 0 and the largest to 1. Masks are about 1/2 on average, which halves the
    effective `beta`. Where a layer's activation is the same in all tokens of a completion, as in completions of one token, there
    is nothing to compare, and it counts 1.

    SparsePO (https://huggingface.co/papers/2410.05102); the paper's z-normalisation ahead of `minmax` cancels out in it. The
    `logits` that it can use besides are left out, as they would need the whole vocabulary for every token.

    Args:
        kinds (`Sequence[str]`, *optional*, defaults to all): Activations, of `mlp`, `q`, `k`, `v`, `v_out` and `residual`, see
            [`~hf_delta.preference.weights.activations.activation_means`].
    """

    needs = frozenset({"kl", "activations"})
    paper = PAPER

    def __init__(self, kinds: Sequence[str] = KINDS):
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        foreign = [kind for kind in kinds if kind not in KINDS]
        if foreign or not kinds or len(set(kinds)) < len(kinds):
            raise InputError(f"mapo: kinds takes some of {', '.join(KINDS)}, each once, got {list(kinds)!r}.")
        self.kinds = kinds

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """The mask for both terms, `(N, T)`, 0 outside of the completions."""
        kinds = [
            torch.stack([_min_max(layer, batch.mask) for layer in batch.activations[kind]]).mean(0)
            for kind in self.kinds
        ]
        mask = torch.stack(kinds).mean(0).to(batch.logps.dtype)
        return TokenTerms(mask, mask)


def _min_max(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of each row moved to [0, 1] among those in the mask, 1 if they are all the same; 0 outside of it."""
    low = torch.where(mask, values, torch.inf).amin(1, keepdim=True)
    high = torch.where(mask, values, -torch.inf).amax(1, keepdim=True)
    spread = high - low
    moved = torch.where(spread > 0, (values - low) / spread, 1.0)
    return torch.where(mask, moved, 0.0)
