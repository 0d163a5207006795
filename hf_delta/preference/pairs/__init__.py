"""Preference pairs from two models: the answer of the stronger one is chosen, that of the weaker one rejected."""

from hf_delta.preference.pairs.assemble import Pairs, make_pairs
from hf_delta.preference.pairs.build import Built, build_pairs
from hf_delta.preference.pairs.delta import Delta, measure_delta


__all__ = ["Built", "Delta", "Pairs", "build_pairs", "make_pairs", "measure_delta"]
