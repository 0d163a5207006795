"""Evaluation before and after training, and the report on both."""

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import Trainer

from hf_delta.errors import InputError
from hf_delta.evaluation import Comparison, Report, evaluate
from hf_delta.recipe import Recipe
from hf_delta.recipe.rewards import resolve_reward
from hf_delta.run.console import announce, console, is_main_process


BEFORE, AFTER, REPORT = "eval_before.json", "eval_after.json", "report.md"

COLUMNS = ("prompt", "answer")


def evaluation_reward(recipe: Recipe, rewards: list[Callable], sharded: bool | None = None) -> Callable | None:
    """The function that judges answers: `evaluate_reward`, else the first of `reward_funcs`; `None` without evaluation.

    Args:
        sharded (`bool`, *optional*): Whether the launch shards the model; by default whether this one does.

    Raises:
        `InputError`: there is none, or the launch shards the model.
    """
    if recipe.run.evaluate_pass_at is None:
        return None
    if sharded is None:
        sharded = recipe.training.distributed_state.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )
    if sharded:
        raise InputError(
            "evaluate_pass_at needs the whole model in each process, which FSDP and DeepSpeed shard. Leave it out, and "
            "run `hf-delta eval` before and after."
        )
    if recipe.run.evaluate_reward is not None:
        return resolve_reward(recipe.run.evaluate_reward, key="evaluate_reward")
    if not rewards:
        raise InputError(f"{recipe.source}: evaluate_pass_at needs evaluate_reward, the function that judges answers.")
    return rewards[0]


def evaluate_policy(trainer: Trainer, recipe: Recipe, rows: Dataset, reward: Callable, when: str) -> Report:
    """pass@k of the trainer's model as it is now. Every process does the whole of it."""
    run, training = recipe.run, recipe.training
    announce(f"Evaluation {when} training: {run.evaluate_samples} answers to each of {len(rows)} held-out problems")
    return evaluate(
        trainer.model,
        trainer.processing_class,
        rows,
        score=reward,
        ks=run.evaluate_pass_at,
        samples=run.evaluate_samples,
        temperature=getattr(training, "temperature", 1.0),
        max_new_tokens=run.evaluate_max_new_tokens or getattr(training, "max_completion_length", 64),
        progress=is_main_process() and not training.disable_tqdm,
        source={"run": str(recipe.output_dir), "when": when, "data": recipe.data.eval_file},
    )


def write_report(before: Report, after: Report, output_dir: Path) -> str:
    """Show the comparison, write the reports and return the comparison as Markdown. For the main process."""
    comparison = Comparison(before, after)
    after.save(output_dir / AFTER, overwrite=True)
    markdown = comparison.markdown()
    (output_dir / REPORT).write_text(markdown + "\n", encoding="utf-8")
    console().print(comparison.table())
    console().print(comparison.examples_table())
    return markdown
