"""What `memory_estimate.py` trains: models, recipes, rows."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hf_delta.recipe import Recipe, load_recipe


MODELS = {
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 13, "num_attention_heads": 12},
    "270M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22, "num_attention_heads": 16},
}
SHARED = {"vocab_size": 24000, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
PLAYGROUND = "playground"
PROMPT = "1+1+1+1:"


def _adapter(method, r):
    return {"method": method, "r": r, "target_modules": "all-linear"}


LORA, CHECKPOINTING = _adapter("lora", 16), {"gradient_checkpointing": True}


@dataclass(frozen=True)
class Case:
    """
    Args:
        model: `playground`, or a name of `MODELS`.
        trainer: As in a recipe.
        adapter: `peft_config`.
        rows: At a time.
        tokens: Of a row, and of a completion for GRPO; of the playground's rows, those that they have.
        more: Other keys.
    """

    model: str
    trainer: str
    adapter: dict[str, Any] | None
    rows: int
    tokens: int = 0
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "playground sft": Case(PLAYGROUND, "sft", None, 32),
    "playground sft edora": Case(PLAYGROUND, "sft", _adapter("edora", 16), 32),
    "playground dpo lora": Case(PLAYGROUND, "dpo", LORA, 32),
    "playground grpo": Case(PLAYGROUND, "grpo", None, 64, 54),
    "playground grpo bone": Case(PLAYGROUND, "grpo", _adapter("bone", 16), 64, 54),
    "100M sft": Case("100M", "sft", None, 2, 128),
    "100M sft, checkpointing": Case("100M", "sft", None, 2, 256, CHECKPOINTING),
    "100M sft, bf16, checkpointing": Case("100M", "sft", None, 2, 256, {"bf16": True, **CHECKPOINTING}),
    "100M sft, bf16, accumulating": Case("100M", "sft", None, 2, 64, {"bf16": True, "gradient_accumulation_steps": 2}),
    "100M sft lora": Case("100M", "sft", LORA, 2, 256),
    "100M sft dora": Case("100M", "sft", _adapter("dora", 16), 2, 256),
    "100M sft edora": Case("100M", "sft", _adapter("edora", 64), 2, 256),
    "100M sft bone": Case("100M", "sft", _adapter("bone", 64), 2, 256),
    "100M dpo": Case("100M", "dpo", None, 1, 128),
    "100M dpo lora, checkpointing": Case("100M", "dpo", LORA, 1, 256, CHECKPOINTING),
    "100M dpo, masks": Case("100M", "dpo", None, 1, 128, {"loss_type": "sparse_po"}),
    "100M dpo, masks of activations": Case("100M", "dpo", None, 1, 128, {"loss_type": "mapo"}),
    "100M dpo, token divergence": Case("100M", "dpo", None, 1, 128, {"loss_type": "tdpo2"}),
    "100M grpo": Case("100M", "grpo", None, 8, 24, {"num_generations": 4}),
    "100M grpo lora": Case("100M", "grpo", LORA, 8, 24, {"num_generations": 4}),
    "270M sft lora, checkpointing": Case("270M", "sft", LORA, 1, 256, CHECKPOINTING),
    "270M sft, bfloat16 weights": Case("270M", "sft", None, 1, 32, {"dtype": "bfloat16", "bf16": True}),
}


def length(completions, **kwargs):
    """A reward that a random model can earn."""
    return [float(len(completion)) for completion in completions]


def build_models(folder: Path, playground: Path, names: set[str]) -> None:
    """Random models with the playground's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(playground / "model")
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    for name in names - {PLAYGROUND}:
        torch.manual_seed(0)
        Qwen3ForCausalLM(Qwen3Config(**MODELS[name], **SHARED, **special)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_recipe(case: Case, folder: Path, models: Path, playground: Path, steps: int) -> Recipe:
    """The recipe of a case, written to a file and read."""
    model = playground / "model" if case.model == PLAYGROUND else models / case.model
    keys = {
        "trainer": case.trainer,
        "output_dir": str(folder / "out"),
        "model_name_or_path": str(model),
        "train_file": str(_rows(case, folder, playground)),
        "max_steps": steps,
        "per_device_train_batch_size": case.rows,
        "learning_rate": 1e-4,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if case.trainer == "grpo":
        keys |= {"reward_funcs": ["memory_cases.length"], "num_generations": 8, "max_completion_length": case.tokens}
        # Every completion as long as it may be, which is what the plan is for.
        keys["generation_kwargs"] = {"min_new_tokens": case.tokens}
    if case.adapter is not None:
        keys["peft_config"] = case.adapter
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys | case.more))
    return load_recipe(str(path))


def _rows(case: Case, folder: Path, playground: Path) -> Path:
    if case.model == PLAYGROUND:
        return playground / {"sft": "sft.jsonl", "dpo": "preference.jsonl", "grpo": "train.jsonl"}[case.trainer]
    # A token is a character, and there is one at the end.
    answer = case.tokens - len(PROMPT) - 1
    columns = {
        "sft": {"completion": "1" * answer},
        "dpo": {"chosen": "1" * answer, "rejected": "2" * answer},
        "grpo": {"answer": "2"},
    }[case.trainer]
    path = folder / "rows.jsonl"
    path.write_text((json.dumps({"prompt": PROMPT, **columns}) + "\n") * 64)
    return path
