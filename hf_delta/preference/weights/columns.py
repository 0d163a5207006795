"""Fixed weights out of the data set."""

from hf_delta.preference.weights.base import TokenBatch, TokenTerms, TokenWeights


class ColumnWeights(TokenWeights):
    """`w_t` of the data set's columns `chosen_weights` and `rejected_weights`: one number a completion, or one a token.

    Args:
        kl (`bool`, *optional*, defaults to `False`): Whether there is a KL term, with the same weights, `v_t = w_t`.
    """

    needs = frozenset({"columns"})
    paper = None  # whose weights these are, the data knows

    def __init__(self, kl: bool = False):
        if kl:
            self.needs = frozenset({"columns", "kl"})

    def weights(self, batch: TokenBatch) -> TokenTerms:
        """The columns, `(N, T)`."""
        columns = batch.columns.to(batch.logps.dtype)
        return TokenTerms(columns, columns if "kl" in self.needs else None)
