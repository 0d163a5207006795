"""Private names of transformers that hf_delta uses; `tests/test_seams.py` compares them with the installed version."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import Trainer, TrainerState
from transformers.integrations import deepspeed


# Parameters of each private method that is called, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {"_load_from_checkpoint": ("self", "resume_from_checkpoint", "model")}

# Accelerate's word to transformers that only the first process of each machine needs weights.
EMPTYING = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def load_checkpoint(trainer: Trainer, checkpoint: str | Path) -> None:
    """Put the weights and the history of a checkpoint into a trainer whose model is not sharded, without a step.

    `Trainer.train` cannot do it: it asks whether `max_steps` is reached after a step, not before.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


@contextmanager
def loaded_whole() -> Iterator[None]:
    """While open, every process loads models whole: not partitioned by ZeRO-3, nor empty but for the first one under FSDP.

    Those are ways to load the model that is trained, which all processes call together.
    """
    partitioning, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    emptying = os.environ.pop(EMPTYING, None)
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = partitioning
        if emptying is not None:
            os.environ[EMPTYING] = emptying
