"""Private names of transformers: a checkpoint is there to its end or does not count, whatever ends the process that writes it."""

import logging
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from hf_delta.checkpoint import newest_complete_checkpoint
from hf_delta.disk import NoRoomError, finds_no_room


logger = logging.getLogger(__name__)

# Parameters of each private method that is overridden or called, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {
    "_get_output_dir": ("self", "trial"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_save_rng_state": ("self", "output_dir"),
}


class SafeSaves(Trainer):
    """Mixin that stands before all others that save.

    Hook, optional:
        `save_extra_state(checkpoint)`: before transformers writes a checkpoint, on every rank; the directory exists.
    """

    def save_extra_state(self, checkpoint: Path) -> None:
        pass

    def checkpoint_of_step(self, trial: Any = None) -> Path:
        """Where the step that has just ended is saved."""
        return Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        Raises:
            [`~hf_delta.disk.NoRoomError`]: the disk is full. What was written is deleted, and earlier checkpoints are not.
        """
        checkpoint = self.checkpoint_of_step(trial)
        if self.args.should_save and checkpoint.exists():
            # Of a run that was killed, or that went on from an earlier one: with some files of either it would seem complete.
            logger.warning("%s is of an earlier try, and written anew.", checkpoint)
            discard(checkpoint)
        self.accelerator.wait_for_everyone()
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            # Before the rest, because pushing to the Hub and rotation happen in there.
            self.save_extra_state(checkpoint)
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not finds_no_room(error):
                raise
            discard(checkpoint)
            newest = newest_complete_checkpoint(checkpoint.parent, self.accelerator.num_processes)
            last = "There is no earlier one" if newest is None else f"The last good one is {newest}"
            raise NoRoomError(
                f"{checkpoint} could not be written, because there is no room on the disk ({finds_no_room(error)}); what was "
                f"written of it is deleted. {last}. Make room, and resume."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The first process says next that the checkpoint is complete, and deletes older ones.
        self.accelerator.wait_for_everyone()


def discard(checkpoint: Path) -> None:
    """Delete a checkpoint; killed in the middle, it leaves one that does not seem complete."""
    (checkpoint / "trainer_state.json").unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)
