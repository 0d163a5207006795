"""Papers of the methods that a run used, for its card. Each stands with its method, as `paper`; those of PEFT stand here."""

from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_delta.adapters.base import DeltaAdapterConfig


Paper = tuple[str, str]  # title, number on arXiv

_DORA = ("DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353")

# PEFT's names of its own methods.
_OF_PEFT: dict[str, Paper] = {
    "LORA": ("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685"),
    "MISS": ("MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", "2409.15371"),
}


def papers_of_training(trainer: Any) -> list[Paper]:
    """Papers of the loss of a trainer, and of its rules."""
    paper = getattr(trainer, "_paper", None) or {}
    found = [(paper["title"], paper["id"])] if paper.get("id") else []
    curriculum = getattr(trainer, "curriculum", None)
    rules = [*getattr(trainer, "advantage_transforms", []), getattr(curriculum, "allocation", None)]
    found += [rule.paper for rule in rules if getattr(rule, "paper", None)]
    return list(dict.fromkeys(found))


def papers_of_adapter(config: dict[str, Any] | None) -> list[Paper]:
    """Papers of the method of an adapter, by its `adapter_config.json`."""
    kind = (config or {}).get("peft_type")
    if kind == "LORA" and config.get("use_dora"):
        return [_DORA]
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, object)
    paper = cls.paper_of(config) if issubclass(cls, DeltaAdapterConfig) else _OF_PEFT.get(kind)
    return [] if paper is None else [paper]
