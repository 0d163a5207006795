"""`dry_run: true`: everything that can be known of a run without network, weights or a GPU."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from datasets import Dataset
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from hf_delta.adapters.dora import fast_dora
from hf_delta.plan.batch import MicroBatch, micro_batch, step_of
from hf_delta.plan.checks import check_batches, check_launch, check_rule, checked_rows, lora_rank
from hf_delta.plan.held import STRATEGIES
from hf_delta.plan.lengths import Lengths, local_tokenizer, measure
from hf_delta.plan.memory import Estimate, estimate
from hf_delta.plan.notes import notes_on_data, notes_on_memory
from hf_delta.plan.parts import Step, Weights
from hf_delta.plan.shapes import adapt, find_config, largest_packed, quantise, saved_bytes, shapes_of, weights_of
from hf_delta.plan.steps import Batches, checkpoints, pair_batches, rollout_batches
from hf_delta.playground.lists import LISTED
from hf_delta.playground.model import build_model
from hf_delta.playground.tasks import load_task
from hf_delta.playground.tokenizer import MAX_LENGTH, build_tokenizer
from hf_delta.recipe import Recipe
from hf_delta.recipe.launch import Launch, current_launch
from hf_delta.recipe.load import use_of_rows
from hf_delta.recipe.peft import wants_fast_dora
from hf_delta.recipe.rewards import resolve_reward
from hf_delta.run.directory import check_output_dir
from hf_delta.run.evaluation import evaluation_reward
from hf_delta.run.extras import check_packages


@dataclass(frozen=True)
class Plan:
    """
    What a run would do.

    Args:
        recipe ([`Recipe`]): What was planned.
        launch ([`Launch`]): For which launch.
        config (`PretrainedConfig`): Shapes of the model.
        shapes (`str`): Where they came from.
        weights ([`Weights`]): Parameters.
        batch ([`MicroBatch`]): Rows and tokens at a time.
        batches ([`Batches`]): Steps.
        step ([`Step`]): What the memory was worked out from.
        estimates (`dict[str, Estimate]`): Memory of a process, by strategy.
        final_bytes (`int`): Of the model or adapter that the run writes.
        checkpoints (`int`, *optional*): How many there are in the end.
        lora_rank (`int`, *optional*): `max_lora_rank` of vLLM for an exported LoRA.
        resumes (`str`, *optional*): Checkpoint that the run goes on from.
        notes (`list[str]`): What was not looked at, and what the numbers rest on.
    """

    recipe: Recipe
    launch: Launch
    config: PretrainedConfig
    shapes: str
    weights: Weights
    batch: MicroBatch
    batches: Batches
    step: Step
    estimates: dict[str, Estimate]
    final_bytes: int
    checkpoints: int | None
    lora_rank: int | None
    resumes: str | None
    notes: list[str] = field(default_factory=list)


def dry_run(recipe: Recipe) -> Plan:
    """Check a recipe as a run would, and plan it. Loads no weights, reads local rows, writes nothing.

    Raises:
        `InputError`: the run cannot work; what, where, and what to do.
    """
    launch = recipe.launch or current_launch()
    rewards = [resolve_reward(entry) for entry in recipe.run.reward_funcs or []]
    judge = evaluation_reward(recipe, rewards, sharded=launch.sharded)
    check_packages(recipe)
    check_launch(recipe, launch)
    check_rule(recipe)
    resumes = check_output_dir(recipe)
    datasets.disable_progress_bars()
    transformers_logging.set_verbosity_error()
    unbuilt = _unbuilt_playground(recipe)
    config, where = _config(recipe, unbuilt)
    found = _count(recipe, config)
    rank = lora_rank(recipe)
    with nullcontext() if unbuilt else checked_rows(recipe, rewards, judge) as rows:
        lengths = _lengths(recipe, rows, unbuilt)
        batches = _batches(recipe, launch, None if rows is None else len(rows))
    check_batches(recipe, batches)
    batch = micro_batch(recipe, lengths, recipe.training.use_cpu)
    step, whole = step_of(recipe, config, found.weights, found.dtype, batch, found.unpacked)
    training = recipe.training
    estimates = {name: estimate(step, name, launch.processes) for name in _strategies(launch, training.use_cpu)}
    return Plan(
        recipe=recipe,
        launch=launch,
        config=config,
        shapes=where,
        weights=found.weights,
        batch=batch,
        batches=batches,
        step=step,
        estimates=estimates,
        final_bytes=found.final,
        checkpoints=checkpoints(
            batches.steps, str(getattr(training.save_strategy, "value", training.save_strategy)), training.save_steps,
            batches.epochs, training.save_total_limit,
        ),
        lora_rank=rank,
        resumes=resumes,
        notes=[
            *notes_on_data(recipe, batch, unbuilt),
            *notes_on_memory(recipe, launch, estimates, whole),
        ],
    )  # fmt: skip


def _strategies(launch: Launch, on_cpu: bool) -> tuple[str, ...]:
    return ("DDP",) if launch.processes == 1 or on_cpu else STRATEGIES


def _unbuilt_playground(recipe: Recipe) -> bool:
    """Whether model and rows are those of a playground that the run would build."""
    playground = recipe.run.playground
    if playground is None or (Path(playground) / "model" / "config.json").is_file():
        return False
    return Path(recipe.model.model_name_or_path).is_relative_to(playground)


def _config(recipe: Recipe, unbuilt: bool) -> tuple[PretrainedConfig, str]:
    if unbuilt:
        task = load_task(recipe.run.playground_task)
        return build_model(build_tokenizer(task.alphabet), 0).config, "the playground, which the run would build"
    name, model = recipe.model.model_name_or_path, recipe.model
    trust = getattr(recipe.training, "trust_remote_code", False)
    return find_config(name, model.model_revision, Path(recipe.source), trust)


class _Counted(NamedTuple):
    weights: Weights
    dtype: torch.dtype
    # Of the largest weight that is unpacked for a moment.
    unpacked: int
    # Of what is written in the end.
    final: int


def _count(recipe: Recipe, config: PretrainedConfig) -> _Counted:
    dtype = _dtype(recipe, config)
    model: nn.Module = shapes_of(config, dtype, recipe.model.attn_implementation)
    bits = 4 if recipe.model.load_in_4bit else 8 if recipe.model.load_in_8bit else None
    unpacked = 0 if bits is None else largest_packed(model)
    if recipe.peft is not None:
        with fast_dora() if wants_fast_dora(recipe.values) else nullcontext():
            model = adapt(model, recipe.peft)
        if bits is not None:
            quantise(model)
    return _Counted(weights_of(model, bits, recipe.model.use_bnb_nested_quant), dtype, unpacked, saved_bytes(model))


def _dtype(recipe: Recipe, config: PretrainedConfig) -> torch.dtype:
    given = (recipe.training.model_init_kwargs or {}).get("dtype", recipe.model.dtype)
    if given in (None, "float32"):
        return torch.float32
    if given == "auto":
        return getattr(config, "dtype", None) or torch.float32
    return given if isinstance(given, torch.dtype) else getattr(torch, given)


def _lengths(recipe: Recipe, rows: Dataset | None, unbuilt: bool) -> Lengths | None:
    if unbuilt:
        # Prompts and answers together; the longest prompt leaves room for an answer.
        use = use_of_rows(recipe.trainer, recipe.training)
        return Lengths(MAX_LENGTH // 2, MAX_LENGTH, LISTED if "lists" in use else 2 if recipe.trainer == "dpo" else 1)
    if rows is None:
        return None
    trust = getattr(recipe.training, "trust_remote_code", False)
    tokenizer = local_tokenizer(recipe.model.model_name_or_path, recipe.model.model_revision, trust)
    return None if tokenizer is None else measure(rows, tokenizer)


def _batches(recipe: Recipe, launch: Launch, rows: int | None) -> Batches:
    t = recipe.training
    common = (rows, t.per_device_train_batch_size, launch.processes, t.gradient_accumulation_steps, t.max_steps)
    if recipe.trainer != "grpo":
        return pair_batches(*common, t.num_train_epochs, t.dataloader_drop_last)
    return rollout_batches(
        *common,
        t.num_train_epochs,
        generations=t.num_generations,
        generation_batch=t.generation_batch_size,
        steps_per_generation=t.steps_per_generation,
        iterations=t.num_iterations,
    )
