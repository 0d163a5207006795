"""Private names of TRL and transformers: where a trainer's own state goes into a checkpoint and comes out of it."""

from pathlib import Path

from hf_delta._compat.hub_pushes import SharedPushes
from hf_delta._compat.running import RunningMetrics
from hf_delta._compat.safe_saves import SafeSaves
from hf_delta._compat.whole_saves import WholeSaves
from hf_delta.errors import InputError


# Parameters of each private method that is overridden, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {"_load_optimizer_and_scheduler": ("self", "checkpoint")}


class ExtraState(RunningMetrics, SafeSaves, WholeSaves, SharedPushes):
    """Mixin for trainers that keep more than model and optimizer.

    Stands before TRL's trainer among the bases. Hooks, all optional:
        `save_extra_state(checkpoint)`: before TRL writes a checkpoint, on every rank; the directory exists.
        `load_extra_weights(checkpoint)`: on resume, on every rank, after the model and before the optimizer, which fails on its
            own where it does not find the parameters that it was saved with.
        `load_extra_state(checkpoint)`: on resume, on every rank, after model and optimizer are loaded.
    """

    def load_extra_weights(self, checkpoint: Path) -> None:
        pass

    def load_extra_state(self, checkpoint: Path) -> None:
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_extra_weights(Path(checkpoint))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if checkpoint is None or isinstance(error, InputError):
                raise
            raise InputError(
                f"{checkpoint}: its optimizer does not fit the model of this run ({error}). Resume with the recipe that wrote it, or "
                "from an earlier checkpoint."
            ) from error
        if checkpoint is not None:
            self.load_extra_state(Path(checkpoint))
