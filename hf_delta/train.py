"""Train a recipe from beginning to end. `hf-delta run RECIPE` and `accelerate launch -m hf_delta.train RECIPE` are this."""

import gc
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import datasets
from datasets import Dataset
from rich.logging import RichHandler
from safetensors import SafetensorError
from transformers import ProgressCallback, Trainer
from trl import get_quantization_config

from hf_delta._compat.transformers import load_checkpoint
from hf_delta.adapters.dora import fast_dora
from hf_delta.checkpoint import steps_of
from hf_delta.data import CACHE, load_eval_rows, load_train_rows
from hf_delta.disk import finds_no_room
from hf_delta.errors import InputError
from hf_delta.evaluation import Report
from hf_delta.plot import plot_pictures
from hf_delta.recipe import Recipe, load_recipe
from hf_delta.recipe.load import use_of_rows
from hf_delta.recipe.peft import wants_fast_dora
from hf_delta.recipe.rewards import resolve_reward
from hf_delta.rules import as_dict
from hf_delta.run.base import ready_model
from hf_delta.run.card import absolute, write_card
from hf_delta.run.console import announce, console, fail, is_main_process, no_room, unusable_path
from hf_delta.run.directory import check_output_dir, clear, finish_manifest, is_finished, write_manifest
from hf_delta.run.evaluation import BEFORE, evaluate_policy, evaluation_reward, write_report
from hf_delta.run.fits import (
    check_batches_are_full,
    check_checkpoint,
    check_finite,
    check_modules_to_save,
    check_template,
    check_vocabulary,
)
from hf_delta.run.hub import check_token
from hf_delta.run.leaving import EXIT_STATUS, StopOnSigterm, Stopped
from hf_delta.run.optimizer import check_optimizer_and_schedule
from hf_delta.run.papers import papers_of_training
from hf_delta.run.processes import main_first, naming_the_process, on_main, parallelism
from hf_delta.run.progress import TrainingProgress
from hf_delta.run.publish import Destination, destination_of, publish_run, ready, without_push
from hf_delta.run.refusals import REFUSALS, refusal
from hf_delta.run.result import read_result
from hf_delta.run.undo import undoing


logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """`RECIPE [--key value ...]`; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # TRL sets the deprecated name in every configuration; there is nothing a user could change.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing` is deprecated", FutureWarning)
    try:
        if not argv or argv[0].startswith("-"):
            raise InputError("the first argument is a recipe, by path or by name: quickstart --max_steps 10.")
        run(load_recipe(argv[0], argv[1:]))
    except InputError as error:
        return fail(error)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (unusable := unusable_path(error)) is not None:
            return fail(unusable)
        reason = finds_no_room(error)
        if reason is None:
            raise
        then = "the same command with --resume goes on from the last checkpoint"
        return fail(no_room(error, reason, then), status=1)
    except KeyboardInterrupt:
        announce("Interrupted. The same command with --resume goes on from the last checkpoint.")
        return 130
    except Stopped as stopped:
        announce(str(stopped))
        return EXIT_STATUS
    return 0


def run(recipe: Recipe) -> Path:
    """Check, train, save and report; with `dry_run`, check and print the plan.

    Collective: every process of a launch calls it with the same recipe.

    Returns:
        `Path`: the output directory, with the final model or adapter, its tokenizer and card, `run.json`, checkpoints
        and reports.

    Raises:
        `InputError`: anything wrong with the recipe, its data, or its output directory; nothing was lost.
        [`~hf_delta.run.leaving.Stopped`]: SIGTERM came while it trained; all is in a checkpoint.
    """
    _set_up_logging()
    if recipe.run.dry_run:
        return _plan(recipe)
    with fast_dora() if wants_fast_dora(recipe.values) else nullcontext(), undoing(recipe.output_dir):
        return _run(recipe)


def _run(recipe: Recipe) -> Path:
    rewards = [resolve_reward(entry) for entry in recipe.run.reward_funcs or []]
    judge = evaluation_reward(recipe, rewards)
    destination = destination_of(recipe)
    check_optimizer_and_schedule(recipe.training, recipe.source)
    if destination is not None and on_main(is_finished, recipe):
        announce(f"{recipe.output_dir} holds this run, finished: nothing is left to train")
        return _push(recipe, destination)
    checkpoint = on_main(check_output_dir, recipe)
    if destination is not None:
        on_main(check_token, destination.token)
    ready_model(recipe)
    train_rows, eval_rows = _load_rows(recipe, rewards, judge)
    if destination is not None:
        destination = on_main(ready, destination)

    trainer = _build_trainer(recipe, train_rows, eval_rows, rewards)
    before = judge and evaluate_policy(trainer, recipe, eval_rows, judge, "before")
    on_main(_write_first_files, recipe, checkpoint, before, papers_of_training(trainer))
    _train(trainer, recipe, checkpoint)
    _save(trainer)

    after = judge and evaluate_policy(trainer, recipe, eval_rows, judge, "after")
    on_main(_report, recipe, before, after)
    on_main(_finish, recipe)
    _end(trainer)
    # After the processes have parted, because none of them can wait for an upload of hours.
    return recipe.output_dir if destination is None else _push(recipe, destination)


def _plan(recipe: Recipe) -> Path:
    from hf_delta.plan.report import show
    from hf_delta.plan.run import dry_run

    destination_of(recipe)  # asks nobody
    check_optimizer_and_schedule(recipe.training, recipe.source)
    show(dry_run(recipe), console())
    return recipe.output_dir


def _set_up_logging() -> None:
    """Our own messages on the main process; what transformers says is governed by `log_level`."""
    package = logging.getLogger("hf_delta")
    package.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    if not package.handlers:
        package.addHandler(RichHandler(console=console(stderr=True), show_time=False, show_path=False))


def _load_rows(recipe: Recipe, rewards: list[Callable], judge: Callable | None) -> tuple[Dataset, Dataset | None]:
    data, use, cache = recipe.data, use_of_rows(recipe.trainer, recipe.training), recipe.output_dir / CACHE
    if not is_main_process() or recipe.training.disable_tqdm:
        datasets.disable_progress_bars()
    evaluates = recipe.training.eval_strategy != "no"
    uses = [use] * evaluates + ["evaluation"] * (judge is not None)
    eval_rewards = [*(rewards if evaluates else []), *([judge] if judge else [])]
    train_rows = main_first(lambda: load_train_rows(data, use, cache, rewards))
    return train_rows, main_first(lambda: load_eval_rows(data, uses, cache, eval_rewards))


def _build_trainer(recipe: Recipe, train_rows: Dataset, eval_rows: Dataset | None, rewards: list[Callable]) -> Trainer:
    training, model = recipe.training, recipe.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **as_dict(training.model_init_kwargs, f"{recipe.source}: model_init_kwargs"),
    }
    if recipe.peft is not None and not Path(model.model_name_or_path).is_dir() and model.model_revision != "main":
        # TRL forgets it, and the adapter would be loaded onto another version.
        recipe.peft.revision = model.model_revision
    try:
        trainer = recipe.trainer_class(
            # Absolute, because an adapter remembers it and may be loaded from another directory.
            model=absolute(model.model_name_or_path),
            args=without_push(training),
            train_dataset=train_rows,
            eval_dataset=eval_rows if training.eval_strategy != "no" else None,
            quantization_config=get_quantization_config(model),
            peft_config=recipe.peft,
            **({"reward_funcs": rewards} if rewards else {}),
        )
    except REFUSALS as error:
        if finds_no_room(error):
            raise
        raise refusal(error, recipe.source) from error
    check_vocabulary(trainer, train_rows)
    check_template(trainer, train_rows)
    check_finite(trainer)
    check_modules_to_save(trainer)
    check_batches_are_full(trainer, recipe.source)
    if not len(trainer.train_dataset):
        # Rows whose prompt fills max_length have nothing to learn from, and TRL leaves them out.
        raise InputError(
            f"{recipe.source}: no row is left to train on: every prompt alone has max_length ({training.max_length}) tokens "
            "or more. Raise max_length."
        )
    if not training.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingProgress)
    return trainer


def _train(trainer: Trainer, recipe: Recipe, checkpoint: str | None) -> None:
    """Collective: train, or take over a checkpoint that is at `max_steps` already, so that a run can be given again."""
    done = 0 if checkpoint is None else steps_of(checkpoint)
    if checkpoint is not None:
        check_checkpoint(trainer, checkpoint)
    if not 0 < recipe.training.max_steps <= done:
        spread = parallelism(trainer.accelerator)
        announce(f"Training: {recipe.trainer}, {recipe.model.model_name_or_path} ({spread})")
        leaving = StopOnSigterm(trainer.accelerator)
        trainer.add_callback(leaving)
        with naming_the_process(), leaving.listening():
            trainer.train(resume_from_checkpoint=checkpoint)
        if leaving.stopped:
            _end(trainer)
            raise Stopped(
                f"Stopped by SIGTERM after step {trainer.state.global_step}, which is saved. The same command with --resume "
                "goes on from there."
            )
        return
    reached = f"{checkpoint} is at step {done}, and max_steps is {recipe.training.max_steps}"
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(f"{reached}: the run is finished. Raise max_steps to go on with it.")
    announce(f"{reached}: nothing is left to train")
    load_checkpoint(trainer, checkpoint)


def _end(trainer: Trainer) -> None:
    """Collective: finish trackers and leave the process group."""
    # DDP's reducer must not be the last owner of the group: freed after it, it can wait for ever for a thread of gloo.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()
    if hasattr(trainer, "end"):  # since transformers 5.18
        trainer.end()
    else:
        trainer.accelerator.end_training()


def _save(trainer: Trainer) -> None:
    """Collective."""
    trainer.save_model(trainer.args.output_dir)
    trainer.save_state()


def _write_first_files(recipe: Recipe, checkpoint: str | None, before: Report | None, papers: list) -> None:
    if recipe.run.overwrite_output_dir:
        clear(recipe.output_dir)
    write_manifest(recipe, checkpoint, papers)
    if before is not None:
        before.save(recipe.output_dir / BEFORE, overwrite=True)


def _report(recipe: Recipe, before: Report | None, after: Report | None) -> None:
    """Comparison and pictures."""
    if before and after:
        write_report(before, after, recipe.output_dir)
    try:
        for name, picture in plot_pictures(recipe.output_dir).items():
            announce(f"{name} in {picture}")
    except InputError as error:  # a run without a single logged value
        logger.warning("%s", error)


def _finish(recipe: Recipe) -> None:
    finish_manifest(recipe.output_dir)
    write_card(read_result(recipe.output_dir))
    announce(f"Saved in {recipe.output_dir}; its README.md says how to load it")


def _push(recipe: Recipe, destination: Destination) -> Path:
    """Upload from the main process alone, without the others."""
    if is_main_process():
        publish_run(recipe.output_dir, destination)
    return recipe.output_dir


if __name__ == "__main__":
    sys.exit(main())
