"""From a batch of rollouts to one weight per sequence: torch in, torch out."""

from hf_delta.rl.weights.base import AdvantageTransform, RolloutBatch, combine_weights
from hf_delta.rl.weights.delta_l import DeltaLWeights, delta_l_weights
from hf_delta.rl.weights.prompt_gdro import PromptGDROWeights


# One line per weight rule: the key is what a recipe writes under `advantage_transforms:`.
WEIGHT_RULES: dict[str, type] = {
    "delta_l": DeltaLWeights,
    "prompt_gdro": PromptGDROWeights,
}

__all__ = [
    "WEIGHT_RULES",
    "AdvantageTransform",
    "DeltaLWeights",
    "PromptGDROWeights",
    "RolloutBatch",
    "combine_weights",
    "delta_l_weights",
]
