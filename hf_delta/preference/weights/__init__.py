"""From a batch of pairs to one weight for each token: torch in, torch out."""

from hf_delta.preference.weights.base import NEEDS, TokenBatch, TokenTerms, TokenWeights
from hf_delta.preference.weights.columns import ColumnWeights
from hf_delta.preference.weights.d2po import D2POWeights
from hf_delta.preference.weights.function import FunctionWeights, checked_terms, rule_name, terms_of, token_rule
from hf_delta.preference.weights.mapo import MaPOWeights
from hf_delta.preference.weights.sparse import SparsePOWeights
from hf_delta.preference.weights.tdpo import TDPO1Weights, TDPO2Weights
from hf_delta.preference.weights.tis import TISDPOWeights, contrast_weights


# One line per rule: the key is what a recipe writes under `token_weights:` or, but for `columns`, under `loss_type:`.
TOKEN_WEIGHTS: dict[str, type[TokenWeights]] = {
    "tdpo1": TDPO1Weights,
    "tdpo2": TDPO2Weights,
    "sparse_po": SparsePOWeights,
    "mapo": MaPOWeights,
    "tis_dpo": TISDPOWeights,
    "d2po": D2POWeights,
    "columns": ColumnWeights,
}

__all__ = [
    "NEEDS",
    "TOKEN_WEIGHTS",
    "ColumnWeights",
    "D2POWeights",
    "FunctionWeights",
    "MaPOWeights",
    "SparsePOWeights",
    "TDPO1Weights",
    "TDPO2Weights",
    "TISDPOWeights",
    "TokenBatch",
    "TokenTerms",
    "TokenWeights",
    "checked_terms",
    "contrast_weights",
    "rule_name",
    "terms_of",
    "token_rule",
]
