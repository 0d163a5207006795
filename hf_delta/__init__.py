"""hf_delta: post-training methods that TRL and PEFT do not have.

Names are resolved on first use, so that `import hf_delta` imports neither torch nor TRL. Its adapters are made known to
PEFT when both packages have been imported, in either order.
"""

import warnings
from importlib import import_module
from typing import Any

from hf_delta._compat.imports import when_imported


__version__ = "0.1.0"

_PUBLIC = {
    "AdvantageTransform": "hf_delta.rl.weights",
    "AllocationRule": "hf_delta.rl.allocation",
    "BoneConfig": "hf_delta.adapters",
    "DeltaDPOConfig": "hf_delta.preference.config",
    "DeltaDPOTrainer": "hf_delta.preference.trainer",
    "DeltaGRPOConfig": "hf_delta.rl.config",
    "DeltaGRPOTrainer": "hf_delta.rl.trainer",
    "DeltaLWeights": "hf_delta.rl.weights",
    "DeltaSFTTrainer": "hf_delta.sft",
    "Difficulty": "hf_delta.rl.difficulty",
    "EdoraConfig": "hf_delta.adapters",
    "InputError": "hf_delta.errors",
    "PmssConfig": "hf_delta.adapters",
    "PromptBatch": "hf_delta.rl.allocation",
    "PromptGDROWeights": "hf_delta.rl.weights",
    "RolloutBatch": "hf_delta.rl.weights",
    "RolloutGDRO": "hf_delta.rl.allocation",
    "disable_fast_dora": "hf_delta.adapters.dora",
    "enable_fast_dora": "hf_delta.adapters.dora",
    "merged_rollouts": "hf_delta.rl.merged",
    "to_lora": "hf_delta.adapters.export",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_delta' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def _register_adapters() -> None:
    try:
        import_module("hf_delta.adapters")
    except ImportError as error:
        # PEFT itself must stay usable; whoever asks for an adapter of ours gets the error.
        warnings.warn(f"the adapters of hf_delta are not registered: {error}", stacklevel=2)


when_imported("peft", _register_adapters)


def __dir__() -> list[str]:
    return sorted(__all__)
