"""Papers of the methods that a run used, for its card."""

from typing import Any


Paper = tuple[str, str]  # title, number on arXiv

_GDRO = ("Group Distributionally Robust Optimization-Driven RL for LLM Reasoning", "2601.19280")
_LORA_XS = ("LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", "2405.17604")
_DORA = ("DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353")

# PEFT's names of methods.
_ADAPTERS: dict[str, Paper] = {
    "LORA": ("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685"),
    "MISS": ("MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "2409.15371"),
    "HFD_BONE": ("MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "2409.15371"),
    "HFD_PMSS": ("PMSS: Pretrained Matrices Skeleton Selection for LLM Fine-tuning", "2409.16722"),
    "HFD_EDORA": (
        "EDoRA: Efficient Weight-Decomposed Low-Rank Adaptation via Singular Value Decomposition",
        "2501.12067",
    ),
}


def papers_of_training(trainer: Any) -> list[Paper]:
    """Papers of the loss and of the rules of a trainer, which knows that of its loss."""
    paper = getattr(trainer, "_paper", None) or {}
    found = [(paper["title"], paper["id"])] if paper.get("id") else []
    keys = ("prompt_weighting", "rollout_allocation")
    if any(getattr(trainer.args, key, None) in ("prompt_gdro", "rollout_gdro") for key in keys):
        found.append(_GDRO)
    return found


def papers_of_adapter(config: dict[str, Any] | None) -> list[Paper]:
    """Papers of the method of an adapter, by its `adapter_config.json`."""
    kind = (config or {}).get("peft_type")
    if kind == "LORA" and config.get("use_dora"):
        return [_DORA]
    if kind == "HFD_EDORA" and config.get("magnitude") is False:
        return [_LORA_XS]
    return [_ADAPTERS[kind]] if kind in _ADAPTERS else []
