"""How hard each prompt is, learnt from the rollouts seen so far."""

from hf_delta.rl.difficulty.bins import PassRateBins
from hf_delta.rl.difficulty.difficulty import Difficulty
from hf_delta.rl.difficulty.rates import PassRates


__all__ = ["Difficulty", "PassRateBins", "PassRates"]
