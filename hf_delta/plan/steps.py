"""Steps, epochs, rollouts and tokens of a run, by the rules of TRL and transformers."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Batches:
    """
    How rows become steps.

    Args:
        rows_per_step (`int`): Rows (for GRPO rollouts) of one optimizer step, over all processes.
        rows (`int`, *optional*): Rows of the data; `None` where they are not known.
        steps (`int`, *optional*): Optimizer steps of the run; `None` where that takes the rows.
        epochs (`float`, *optional*): Passes over the data.
        prompts_per_generation (`int`, *optional*): For GRPO: prompts that get rollouts at a time.
        rollouts_per_generation (`int`, *optional*): For GRPO: their rollouts, over all processes.
        generations (`int`, *optional*): For GRPO: how often rollouts are made.
    """

    rows_per_step: int
    rows: int | None
    steps: int | None
    epochs: float | None
    prompts_per_generation: int | None = None
    rollouts_per_generation: int | None = None
    generations: int | None = None


def pair_batches(
    rows: int | None, batch: int, processes: int, accumulation: int, max_steps: int, epochs: float, drop_last: bool
) -> Batches:
    """For SFT and DPO: a step takes `batch * processes * accumulation` rows.

    An epoch has `ceil(ceil(rows / (batch * processes)) / accumulation)` steps.
    """
    per_step = batch * processes * accumulation
    if rows is None:
        return Batches(per_step, None, max_steps if max_steps > 0 else None, None if max_steps > 0 else epochs)
    divide = math.floor if drop_last else math.ceil
    micro = divide(rows / (batch * processes))
    per_epoch = max(math.ceil(micro / accumulation), 1)
    steps = max_steps if max_steps > 0 else math.ceil(epochs * per_epoch)
    return Batches(per_step, rows, steps, steps / per_epoch)


def rollout_batches(
    rows: int | None,
    batch: int,
    processes: int,
    accumulation: int,
    max_steps: int,
    epochs: float,
    *,
    generations: int,
    generation_batch: int,
    steps_per_generation: int,
    iterations: int,
) -> Batches:
    """For GRPO: every `steps_per_generation * iterations` micro-steps `generation_batch / generations` prompts get rollouts.

    An epoch has `floor(rows / prompts)` generations; what is left over is not used.
    """
    per_step = batch * processes * accumulation
    prompts = generation_batch // generations
    window = steps_per_generation * iterations
    per_epoch = None
    if rows is not None:
        per_epoch = math.ceil(rows // prompts * window / accumulation)
    if max_steps > 0:
        steps, passes = max_steps, None if not per_epoch else max_steps / per_epoch
    else:
        steps, passes = None if per_epoch is None else math.ceil(epochs * per_epoch), epochs
    made = None if steps is None else math.ceil(steps * accumulation / window)
    return Batches(per_step, rows, steps, passes, prompts, generation_batch, made)


def checkpoints(
    steps: int | None, strategy: str, save_steps: float, epochs: float | None, limit: int | None
) -> int | None:
    """How many checkpoints there are at the end; the last step has one too."""
    if strategy == "no":
        return 0
    if strategy == "epoch":
        made = None if epochs is None else math.ceil(epochs)
    elif steps is None:
        made = None
    else:
        every = max(1, math.ceil(steps * save_steps)) if save_steps < 1 else int(save_steps)
        made = math.ceil(steps / every)
    if made is None:
        return limit
    return made if limit is None else min(made, limit)
