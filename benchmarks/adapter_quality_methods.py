"""The methods of `adapter_quality.py`, each with about as many trained parameters as LoRA of rank 7 on the same matrices."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

from peft import LoraConfig, MissConfig, get_peft_model

import hf_delta


MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 7


@dataclass(frozen=True)
class Method:
    """How to adapt a model.

    Args:
        config: makes the configuration; None trains the matrices themselves.
        lr: where the search for a learning rate starts.
    """

    config: Callable | None
    lr: float


def _lora(r=RANK, alpha=2 * RANK, **options):
    return lambda: LoraConfig(r=r, lora_alpha=alpha, target_modules=list(MATRICES), **options)


def _ours(name, **options):
    return lambda: getattr(hf_delta, name)(target_modules=list(MATRICES), **options)


# The magnitudes of DoRA take the place of one rank in the MLP.
_MLP = ("gate_proj", "up_proj", "down_proj")
_DORA = {
    "use_dora": True,
    "rank_pattern": dict.fromkeys(_MLP, RANK - 1),
    "alpha_pattern": dict.fromkeys(_MLP, 2 * (RANK - 1)),
}

METHODS = {
    "LoRA": Method(_lora(), 8e-3),
    "rsLoRA": Method(_lora(use_rslora=True), 8e-3),
    "PiSSA": Method(_lora(alpha=RANK, init_lora_weights="pissa"), 4e-3),
    "DoRA": Method(_lora(**_DORA), 8e-3),
    "MiSS": Method(lambda: MissConfig(r=12, target_modules=list(MATRICES)), 4e-3),
    "Bone": Method(_ours("BoneConfig", r=12, mode="bone"), 4e-3),
    "Bone row": Method(_ours("BoneConfig", r=16, mode="row"), 4e-3),
    "BAT": Method(_ours("BoneConfig", r=16, mode="bat_row"), 4e-3),
    "PMSS": Method(_ours("PmssConfig", r=38), 4e-3),
    "EDoRA": Method(_ours("EdoraConfig", r=37), 8e-3),
    "full": Method(None, 1e-3),
}

# Not at equal parameters: for orientation.
ORIENTATION = ("full",)


def adapted(base, name):
    """A copy of the base model with a fresh adapter; random numbers come from torch's global state."""
    model, method = deepcopy(base), METHODS[name]
    if method.config is not None:
        return get_peft_model(model, method.config())
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.split(".")[-2] in MATRICES)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
