"""Recipes for tests: written to a file, run in this process."""

import yaml

from hf_delta.recipe import load_recipe
from hf_delta.train import run


CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
SHORT = {
    "max_steps": 2,
    "max_train_rows": 64,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    **CPU,
}
LORA = {"method": "lora", "r": 4, "target_modules": "all-linear"}
GRPO = {"reward_funcs": ["playground_reward"], "num_generations": 4, "max_completion_length": 8}


def length(completions, **kwargs):
    """A reward that the barely trained model of the tests can earn."""
    return [float(len(completion)) for completion in completions]


def keys(trainer, playground, out, **changes):
    """Keys of a short run on a playground; a change to `None` removes the key."""
    found = {
        "trainer": trainer,
        "playground": str(playground),
        "playground_pretrain_steps": 20,
        "output_dir": str(out),
        **SHORT,
        **(GRPO if trainer == "grpo" else {}),
        **changes,
    }
    return {key: value for key, value in found.items() if value is not None}


def write(folder, content):
    """A recipe file with keys in the order of `content`, one a line where their values fit."""
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def train(folder, content, *flags):
    """Write, load and run a recipe; returns its output directory."""
    return run(load_recipe(str(write(folder, content)), [*flags]))
