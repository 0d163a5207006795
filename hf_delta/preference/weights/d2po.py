"""D2PO: tokens weigh less the later they come."""

from hf_delta.errors import InputError
from hf_delta.preference.weights.base import TokenBatch, TokenTerms, TokenWeights


class D2POWeights(TokenWeights):
    """`w_t = gamma^t`, with `t = 0` at the first token of the completion; no KL term. `gamma = 1` is DPO.

    Earlier Tokens Contribute More (https://huggingface.co/papers/2502.14340). Its published code counts from 1, which is this
    with `gamma * beta` in place of `beta`.

    Args:
        gamma (`float`, *optional*, defaults to `0.98`): Decay from one token to the next, above 0 and at most 1.
    """

    paper = (
        "Earlier Tokens Contribute More: Learning Direct Preference Optimization From Temporal Decay Perspective",
        "2502.14340",
    )

    def __init__(self, gamma: float = 0.98):
        if not 0 < gamma <= 1:
            raise InputError(f"d2po: gamma is a decay from token to token, above 0 and at most 1, got {gamma!r}.")
        self.gamma = gamma

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """`gamma^t`, `(N, T)`."""
        positions = (batch.mask.cumsum(1) - 1).clamp(min=0)
        return TokenTerms(self.gamma ** positions.to(batch.logps.dtype))
