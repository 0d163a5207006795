"""From a recipe file and flags to checked configuration objects, before any model or dataset is loaded."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_delta._compat.planned import another_machine
from hf_delta.errors import InputError
from hf_delta.paths import expanded
from hf_delta.recipe.arguments import DataArguments, RunArguments
from hf_delta.recipe.fields import build, suggest, type_hints
from hf_delta.recipe.find import find_recipe
from hf_delta.recipe.launch import Launch, planned_launch
from hf_delta.recipe.limits import check_deepspeed, check_limits, check_report_to
from hf_delta.recipe.peft import build_peft_config
from hf_delta.recipe.source import SHORT_FLAGS, Node, apply_overrides, read_recipe


if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import Trainer, TrainingArguments
    from trl import ModelConfig

# trainer: -> (configuration, trainer), as dotted paths so that reading recipes' names imports neither.
TRAINERS = {
    "sft": ("trl.SFTConfig", "hf_delta.sft.DeltaSFTTrainer"),
    "dpo": ("hf_delta.preference.config.DeltaDPOConfig", "hf_delta.preference.trainer.DeltaDPOTrainer"),
    "grpo": ("hf_delta.rl.config.DeltaGRPOConfig", "hf_delta.rl.trainer.DeltaGRPOTrainer"),
}

# Paths that neither transformers nor we expand when they are used.
_PATHS = ("playground", "model_name_or_path", "resume_from_checkpoint")

# What rows are used for, see `use_of_rows` -> the file of a playground that has them.
PLAYGROUND_TRAIN_FILES = {
    "sft": "sft.jsonl",
    "dpo": "preference.jsonl",
    "dpo_weights": "weighted.jsonl",
    "dpo_lists": "lists.jsonl",
    "dpo_labelled_lists": "lists.jsonl",
    "grpo": "train.jsonl",
}

_PEFT_HINT = "Adapters are set in the block `peft_config:`, with `method: lora` and the fields of its configuration."
_LAUNCH_HINT = "It is a setting of `accelerate launch`: give it there, before `-m hf_delta.train`."
_HINTS = {
    "dataset_train_split": "Write dataset_split.",
    "dataset_test_split": "Write eval_split.",
    "datasets": "Write dataset_name or train_file.",
    "config_file": _LAUNCH_HINT,
}


@dataclass(frozen=True)
class Recipe:
    """
    A checked recipe.

    Args:
        source (`str`): The file it was read from.
        values (`dict`): The keys as written, with flags applied.
        trainer (`str`): Key of [`TRAINERS`].
        model (`trl.ModelConfig`): How to load the model.
        data (`DataArguments`): Where the rows come from.
        run (`RunArguments`): What happens around training.
        training (`transformers.TrainingArguments`): Configuration of the trainer.
        peft (`peft.PeftConfig` or `None`): Adapter; `None` is full fine-tuning.
        launch (`Launch`, *optional*): What `dry_run` plans for.
    """

    source: str
    values: dict[str, Any]
    trainer: str
    model: "ModelConfig"
    data: DataArguments
    run: RunArguments
    training: "TrainingArguments"
    peft: "PeftConfig | None"
    launch: Launch | None = None

    @property
    def trainer_class(self) -> "type[Trainer]":
        return _resolve(TRAINERS[self.trainer][1])

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)


def load_recipe(path_or_name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `--key value` flags, and check every key, type and range.

    Args:
        path_or_name (`str`): A file, or the name of a shipped recipe such as `quickstart` or `rl/delta_l_tiny`.
        overrides (`list[str]`, *optional*): Flags as on the command line.

    Raises:
        `InputError`: anything wrong with the recipe, with file and line.
    """
    path = find_recipe(path_or_name)
    source = str(path)
    nodes = apply_overrides(read_recipe(path), overrides)
    launch = planned_launch(nodes)
    if launch is None:
        return _load(nodes, source)
    with another_machine(launch.processes):
        return replace(_load(nodes, source), launch=launch)


def _load(nodes: dict[str, Node], source: str) -> Recipe:
    trainer = trainer_name(nodes.pop("trainer", None), source)
    _expand_home(nodes)
    owners = key_owners(trainer)
    training = _training(_sort_keys(nodes, owners, trainer), source)
    # Which file of a playground has the rows is known once the loss is.
    _fill_from_playground(nodes, use_of_rows(trainer, training))
    parts = _sort_keys(nodes, owners, trainer)
    model_class = next(iter(parts))
    run = build(RunArguments, parts[RunArguments], source)
    recipe = Recipe(
        source=source,
        values={"trainer": trainer, **{key: node.plain() for key, node in nodes.items()}},
        trainer=trainer,
        model=build(model_class, parts[model_class], source),
        data=build(DataArguments, parts[DataArguments], source),
        run=run,
        training=training,
        peft=None if run.peft_config is None else build_peft_config(nodes["peft_config"], source),
    )
    _check(recipe)
    return recipe


def use_of_rows(trainer: str, training: "TrainingArguments") -> str:
    """What a trainer uses rows for: its name, or for DPO a key of [`~hf_delta.preference.uses.USES`]."""
    if trainer != "dpo":
        return trainer
    from hf_delta.preference.checks import uses_columns
    from hf_delta.preference.uses import preference_use

    weights = uses_columns(training.build_rule())
    return preference_use(training.loss_type, weights=weights, rescale=training.list_rescale)


def _training(parts: Mapping[type, dict[str, Node]], source: str) -> "TrainingArguments":
    *_, training_class = parts
    nodes = parts[training_class]
    check_limits(nodes)
    check_report_to(nodes.get("report_to"))
    check_deepspeed(nodes.get("deepspeed"))
    return build(training_class, nodes, source)


def _resolve(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def trainer_name(node: Node | None, source: str) -> str:
    """The value of `trainer:`, checked."""
    if node is None or node.value is None:
        raise InputError(f"{source}: trainer is missing; write `trainer: {' | '.join(TRAINERS)}`.")
    if not isinstance(node.value, str) or node.value not in TRAINERS:
        raise InputError(f"{node.where}: there is no trainer {node.plain()!r}{suggest(node.plain(), TRAINERS)}")
    return node.value


def _expand_home(nodes: dict[str, Node]) -> None:
    for key in _PATHS:
        node = nodes.get(key)
        if node is not None and isinstance(node.value, str) and node.value.startswith("~"):
            nodes[key] = Node(str(expanded(node.value)), node.where)


def _fill_from_playground(nodes: dict[str, Node], use: str) -> None:
    playground = nodes.get("playground")
    if playground is None or not isinstance(playground.value, str):
        return
    defaults = {"model_name_or_path": "model"}
    if "dataset_name" not in nodes:
        defaults |= {"train_file": PLAYGROUND_TRAIN_FILES[use], "eval_file": "eval.jsonl"}
    for key, name in defaults.items():
        nodes.setdefault(key, Node(str(Path(playground.value) / name), playground.where))


def key_owners(trainer: str) -> dict[str, type]:
    """Every key that a recipe for a trainer can have, and the class that it is a field of: the first that has it."""
    owners: dict[str, type] = {}
    for cls in _classes(trainer):
        for key in type_hints(cls):
            if not _is_lora_key(key, cls):
                owners.setdefault(key, cls)
    return owners


def _classes(trainer: str) -> tuple[type, ...]:
    return _resolve("trl.ModelConfig"), DataArguments, RunArguments, _resolve(TRAINERS[trainer][0])


def _is_lora_key(key: str, cls: type) -> bool:
    """Those of `trl.ModelConfig`, which know LoRA only; here it is `peft_config:`."""
    return cls.__name__ == "ModelConfig" and (key.startswith("lora_") or key in ("use_peft", "use_dora", "use_rslora"))


def _sort_keys(nodes: Mapping[str, Node], owners: Mapping[str, type], trainer: str) -> dict[type, dict[str, Node]]:
    parts: dict[type, dict[str, Node]] = {cls: {} for cls in _classes(trainer)}
    for key, node in nodes.items():
        if key not in owners:
            raise InputError(f"{node.where}: {_unknown(key, owners, trainer)}")
        parts[owners[key]][key] = node
    return parts


def _unknown(key: str, known: Mapping[str, type], trainer: str) -> str:
    if key in type_hints(_resolve("trl.ModelConfig")):
        return f"{key} is not a key here. {_PEFT_HINT}"
    if key in _HINTS:
        return f"{key} is not a key here. {_HINTS[key]}"
    others = [name for name, (config, _) in TRAINERS.items() if key in type_hints(_resolve(config))]
    if others:
        return f"{key} is a key of trainer {' and '.join(others)}, not of trainer {trainer}."
    return f"unknown key {key!r}{suggest(key, [*known, *SHORT_FLAGS, 'trainer'])}"


def _check(recipe: Recipe) -> None:
    """What several keys say together."""
    where, values, run = recipe.source, recipe.values, recipe.run
    if not values.get("output_dir"):
        raise InputError(
            f"{where}: output_dir is missing; everything the run writes goes there. Write output_dir: runs/mine."
        )
    if not recipe.model.model_name_or_path:
        raise InputError(
            f"{where}: model_name_or_path is missing; write a directory, or the id of a model of the Hub."
        )
    if recipe.data.dataset_name is None and recipe.data.train_file is None:
        raise InputError(f"{where}: there is nothing to train on; write dataset_name or train_file.")
    if (recipe.trainer == "grpo") != bool(run.reward_funcs):
        if recipe.trainer == "grpo":
            raise InputError(f"{where}: trainer grpo needs reward_funcs; write reward_funcs: [my_module.my_function].")
        raise InputError(f"{where}: trainer {recipe.trainer} has no use for reward_funcs. Remove it.")
    weights = getattr(recipe.training, "reward_weights", None)
    if weights is not None and len(weights) != len(run.reward_funcs or []):
        raise InputError(
            f"{where}: reward_weights has {len(weights)} numbers for {len(run.reward_funcs)} reward_funcs."
        )
    if recipe.peft is None and (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        raise InputError(f"{where}: a quantised model cannot be trained fully. {_PEFT_HINT}")
    if run.evaluate_pass_at is not None and recipe.data.eval_file is None:
        raise InputError(f"{where}: evaluate_pass_at needs eval_file.")
    has_eval_data = recipe.data.eval_file is not None or recipe.data.eval_split is not None
    if recipe.training.eval_strategy != "no" and not has_eval_data:
        raise InputError(f"{where}: eval_strategy needs eval_file or eval_split.")
    if recipe.training.n_gpu > 1:
        raise InputError(
            f"{recipe.training.n_gpu} GPUs are visible to one process. Start one process for each with `accelerate launch "
            f"--num_processes {recipe.training.n_gpu} -m hf_delta.train {where}`, or show it one with "
            "CUDA_VISIBLE_DEVICES=0."
        )
