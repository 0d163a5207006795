"""What vLLM takes as a LoRA adapter, and which adapters cannot be written as one."""

from collections.abc import Callable
from typing import Any

from peft import PeftConfig

from hf_delta.errors import InputError


# The values that vLLM's `max_lora_rank` may have; an adapter of a rank between two of them needs the next one.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

# LoRA starts that change the base weights, so that the saved factors mean nothing without them.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

_MERGE = "use the format merged"


def vllm_rank(rank: int) -> int:
    """The smallest rank of vLLM's list that holds `rank`.

    Raises:
        `InputError`: there is none.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"rank is {rank!r}: write a whole number from 1 to {VLLM_RANKS[-1]}.")
    if rank > VLLM_RANKS[-1]:
        raise InputError(
            f"rank {rank} is above {VLLM_RANKS[-1]}, the largest that vLLM takes: give a rank up to {VLLM_RANKS[-1]}, which "
            f"leaves out the smallest singular values, or {_MERGE}."
        )
    return next(allowed for allowed in VLLM_RANKS if allowed >= rank)


def check_weight_change(config: PeftConfig) -> None:
    """
    Raises:
        `InputError`: the adapter is no change of the base model's weights, or a change of other weights than these.
    """
    if config.is_prompt_learning:
        raise InputError(f"{config.peft_type.value} changes no weights of the model, so there is nothing to export.")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise InputError(
            f"init_lora_weights: {start} has changed the base weights too. Save the adapter relative to the unchanged ones "
            "first, with PEFT's path_initial_model_for_weight_conversion, and export that."
        )
    for field in ("layer_replication", "alora_invocation_tokens"):
        if getattr(config, field, None):
            raise InputError(
                f"{field} changes the model beyond its weights: neither LoRA nor merged weights can say that."
            )


# What an adapter may have besides factors, and how to tell.
_EXTRAS: dict[str, Callable[[Any], Any]] = {
    "modules_to_save": lambda config: getattr(config, "modules_to_save", None),
    "bias": lambda config: getattr(config, "bias", "none") not in ("none", None),
    "lora_bias": lambda config: getattr(config, "lora_bias", False),
    "trainable_token_indices": lambda config: getattr(config, "trainable_token_indices", None),
    "target_parameters": lambda config: getattr(config, "target_parameters", None),
}


def check_only_factors(config: PeftConfig) -> None:
    """
    Raises:
        `InputError`: the adapter has trained more than what low-rank factors of layers hold.
    """
    for field, has in _EXTRAS.items():
        if has(config):
            raise InputError(
                f"{field}: {getattr(config, field)!r} cannot be part of a LoRA adapter for vLLM; {_MERGE}."
            )
