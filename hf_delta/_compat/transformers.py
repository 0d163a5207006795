"""Private names of transformers that hf_delta uses; `tests/test_seams.py` compares them with the installed version."""

from pathlib import Path

from transformers import Trainer, TrainerState


# Parameters of each private method that is called, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {"_load_from_checkpoint": ("self", "resume_from_checkpoint", "model")}


def load_checkpoint(trainer: Trainer, checkpoint: str | Path) -> None:
    """Put the weights and the history of a checkpoint into a trainer whose model is not sharded, without a step.

    `Trainer.train` cannot do it: it asks whether `max_steps` is reached after a step, not before.
    """
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
