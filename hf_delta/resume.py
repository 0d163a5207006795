"""What every trainer of ours does on resume: take the newest whole checkpoint, and refuse that of another method or launch."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_delta.checkpoint import (
    STATE_FILE,
    check_state,
    load_state,
    newest_complete_checkpoint,
    written_under,
    zero_partitions,
)
from hf_delta.errors import InputError


logger = logging.getLogger(__name__)


class Resumable(Trainer):
    """Mixin that stands before the trainer among the bases."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As [`~transformers.Trainer.train`]; `True` resumes from the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            newest = newest_complete_checkpoint(self.args.output_dir, self.accelerator.num_processes)
            if newest is None:
                raise InputError(f"resume_from_checkpoint: {self.args.output_dir} holds no complete checkpoint.")
            resume_from_checkpoint = str(newest)
        if resume_from_checkpoint:
            self._check_sharding(resume_from_checkpoint)
            check_batches(resume_from_checkpoint, self.args)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_sharding(self, checkpoint: str) -> None:
        there, here = written_under(checkpoint), "no sharding"
        if self.is_fsdp_enabled:
            here = f"FSDP with {self.accelerator.state.fsdp_plugin.state_dict_type.name}"
        elif self.is_deepspeed_enabled:
            partitions = self.accelerator.state.deepspeed_plugin.zero_stage == 3
            here = "DeepSpeed ZeRO-3" if partitions else "DeepSpeed with whole weights"
        if there not in (None, here):
            raise InputError(
                f"{checkpoint} was written under {there}, and this run has {here}. Resume with the configuration of accelerate "
                "that wrote it."
            )
        partitions = zero_partitions(checkpoint)
        if partitions not in (0, self.accelerator.num_processes):
            raise InputError(
                f"{checkpoint} holds the states of {partitions} processes of DeepSpeed, and this run has "
                f"{self.accelerator.num_processes}, among which it cannot divide them. Launch {partitions} processes."
            )


def batches(args: TrainingArguments) -> dict[str, int]:
    """How rows come to a step: processes, rows of each in a forward pass, passes in a step, and with GRPO rows of a generation."""
    found = {
        "num_processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "rows_per_step": args.world_size * args.train_batch_size * args.gradient_accumulation_steps,
    }
    generation = getattr(args, "generation_batch_size", None)
    return found if generation is None else {**found, "generation_batch_size": generation}


def check_batches(checkpoint: str | Path, args: TrainingArguments) -> None:
    """See that a run with another number of processes goes on with the rows at which the checkpoint stopped.

    transformers finds the place by counting steps. Checkpoints of TRL do not say how they were launched.

    Raises:
        `InputError`: a step, or a generation, takes another number of rows there than here.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.exists():
        return
    with reading(path):
        there, here = load_state(path)["layout"], batches(args)
        processes, rows = there["num_processes"], there["rows_per_step"]
    launches = f"{checkpoint} was written by {_counted(processes, 'process')} with %s, and this run is {_counted(here['num_processes'], 'process')} with %s"
    if processes == here["num_processes"]:
        if rows != here["rows_per_step"]:
            logger.warning(
                "%s was written with %s rows a step, and this run has %s: where it goes on in the data is counted in steps.",
                checkpoint,
                rows,
                here["rows_per_step"],
            )
        return
    if rows != here["rows_per_step"]:
        passes, rest = divmod(rows, here["rows_per_step"] // here["gradient_accumulation_steps"])
        advice = "per_device_train_batch_size and gradient_accumulation_steps that give as many rows"
        if not rest and passes:
            advice = f"gradient_accumulation_steps: {passes}"
        raise InputError(
            f"{launches % (f'{rows} rows a step', here['rows_per_step'])}: it would go on at other rows. Write {advice}."
        )
    generation = there.get("generation_batch_size")
    if generation != here.get("generation_batch_size"):
        raise InputError(
            f"{launches % (f'{generation} completions a generation', here.get('generation_batch_size'))}: it would go on at other "
            f"prompts. Write generation_batch_size: {generation}, without steps_per_generation."
        )
    logger.warning(
        "%s: the run goes on at the same rows and with the same state, and not bit for bit: each process draws its own random "
        "numbers.",
        launches % (f"{rows} rows a step", "as many"),
    )


def _counted(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}es"


def check_method(path: Path, state: dict[str, Any], method: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare what a state file was saved with to what this run has; a changed setting is logged.

    Args:
        path (`Path`): The file, for the message.
        state (`dict`): What stands in it, with the entries `method` and `settings`.
        method (`dict`): What must be equal.
        settings (`dict`): What may be changed.

    Raises:
        `InputError`: the methods differ.
    """
    if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in ("method", "settings")):
        raise InputError(
            f"{path} is damaged: it does not say which method it is of. Resume from an earlier checkpoint."
        )
    saved = state["method"]
    differing = [
        f"{key}: {saved.get(key)!r} there, {value!r} here" for key, value in method.items() if saved.get(key) != value
    ]
    if differing:
        raise InputError(
            f"{path} belongs to another method ({'; '.join(differing)}). Resume with the recipe that wrote it, or "
            "start a new run in another output_dir."
        )
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            logger.warning(
                "%s was saved with %s %s; the run goes on with %s.", path, key, state["settings"].get(key), value
            )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Inside, what a state file lacks, or holds in another form than is read here, is said as one error.

    Raises:
        `InputError`: it is damaged, or of another version of hf_delta.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path} does not hold what this hf_delta reads ({type(error).__name__}: {error}): it is damaged, or of another "
            "version. Resume from an earlier checkpoint."
        ) from error


def state_of(rule: Any, name: str) -> Any:
    """What a rule wants to be kept: its `state_dict()`, `{}` without one.

    Raises:
        `InputError`: it cannot be saved.
    """
    state = getattr(rule, "state_dict", dict)()
    try:
        check_state(state)
    except (TypeError, ValueError) as error:
        raise InputError(f"state_dict() of the {name} cannot be saved: {error}") from error
    return state
