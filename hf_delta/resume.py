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
            if (other := other_optimizer(resume_from_checkpoint, self.args)) is not None:
                logger.warning("%s", other)
            if (different := check_batches(resume_from_checkpoint, self.args)) is not None:
                logger.warning("%s", different)
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
        if partitions and partitions != self.accelerator.num_processes:
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


def check_batches(checkpoint: str | Path, args: TrainingArguments) -> str | None:
    """See that a run with another number of processes goes on with the rows at which the checkpoint stopped.

    transformers finds the place by counting steps. Checkpoints of TRL do not say how they were launched.

    Returns:
        `str`, *optional*: What one should know of a launch that is another, and works.

    Raises:
        `InputError`: a step, or a generation, takes another number of rows there than here.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.exists():
        return None
    with reading(path):
        there, here = load_state(path)["layout"], batches(args)
        processes, rows = there["num_processes"], there["rows_per_step"]
    if processes == here["num_processes"]:
        if rows == here["rows_per_step"]:
            return None
        return (
            f"{checkpoint} was written with {rows} rows a step, and this run has {here['rows_per_step']}: its place in the data "
            "is found by counting steps of this run."
        )
    launches = f"{checkpoint} was written by {_counted(processes)} with {{}}, and this run is {_counted(here['num_processes'])} with {{}}"
    if rows != here["rows_per_step"]:
        raise InputError(
            f"{launches.format(f'{rows} rows a step', here['rows_per_step'])}: it would go on at other rows. Write "
            f"{_same_rows(rows, here)}."
        )
    one, other = (layout.get("generation_batch_size") for layout in (there, here))
    if one != other:
        raise InputError(
            f"{launches.format(f'{one} completions a generation', other)}: it would go on at other prompts. Write "
            f"generation_batch_size: {one}, without steps_per_generation."
        )
    return (
        f"{launches.format(f'{rows} rows a step', 'as many')}: it goes on at the same rows and with the same state, but not bit for "
        "bit, because each process draws its own random numbers."
    )


def optimizer_settings(args: TrainingArguments) -> dict[str, Any]:
    """What an optimizer keeps in its checkpoint, and takes from there on resume, whatever the new configuration says."""
    keys = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
    # The fused one computes the same, and which is the default depends on the version of torch.
    kind = str(getattr(args.optim, "value", args.optim)).removesuffix("_fused")
    return {"optim": kind, **{key: getattr(args, key) for key in keys}}


def other_optimizer(checkpoint: str | Path, args: TrainingArguments) -> str | None:
    """What to say of a run that asks for another optimizer than that of the checkpoint; `None` where it does not.

    transformers goes on with the old values, or breaks. Checkpoints of TRL do not say which they were.
    """
    path = Path(checkpoint) / STATE_FILE
    if not path.exists() or written_under(checkpoint) is None:
        return None
    with reading(path):
        there = dict(load_state(path).get("optimizer") or {})
    here = optimizer_settings(args)
    for key in here:
        if key in there and there[key] != here[key]:
            return (
                f"{checkpoint}: its optimizer has {key} {there[key]!r}, which it would keep, and this run has {here[key]!r}. Write "
                f"{key}: {there[key]}, or start in another output_dir."
            )
    return None


def _same_rows(rows: int, here: dict[str, int]) -> str:
    passes, rest = divmod(rows, here["rows_per_step"] // here["gradient_accumulation_steps"])
    if rest or not passes:
        return f"per_device_train_batch_size and gradient_accumulation_steps that make {rows} rows with all processes"
    return f"gradient_accumulation_steps: {passes}"


def _counted(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"


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
