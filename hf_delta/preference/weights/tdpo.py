"""TDPO: DPO over tokens, with the KL to the reference on both sides."""

import torch

from hf_delta.errors import InputError
from hf_delta.preference.weights.base import TokenBatch, TokenTerms, TokenWeights


PAPER = ("Token-level Direct Preference Optimization", "2404.11999")


class TDPO1Weights(TokenWeights):
    """All weights 1: the margin is `(r_c - r_r) - (K_r - K_c)`, with `K = sum_t KL(pi_ref || pi)_t` in nats.

    Token-level Direct Preference Optimization (https://huggingface.co/papers/2404.11999).
    """

    needs = frozenset({"kl"})
    paper = PAPER

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """1 for every token, `(N, T)` twice."""
        ones = torch.ones_like(batch.logps)
        return TokenTerms(ones, ones)


class TDPO2Weights(TokenWeights):
    """KL weights `alpha`, and no gradient through the chosen KL: the margin is `(r_c - r_r) - alpha (K_r - stop_gradient(K_c))`.

    Token-level Direct Preference Optimization (https://huggingface.co/papers/2404.11999).

    Args:
        alpha (`float`, *optional*, defaults to `0.5`): Weight of the KL term, 0 or more.
    """

    needs = frozenset({"kl"})
    paper = PAPER
    constant_chosen_kl = True

    def __init__(self, alpha: float = 0.5):
        if not 0 <= alpha < float("inf"):
            raise InputError(f"tdpo2: alpha is the weight of the KL term and must be 0 or more, got {alpha!r}.")
        self.alpha = alpha

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """1 for rewards and `alpha` for the KL, `(N, T)` each."""
        ones = torch.ones_like(batch.logps)
        return TokenTerms(ones, self.alpha * ones)
