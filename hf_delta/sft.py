"""TRL's SFT, saved whole wherever it is sharded, and resumed where it stopped."""

from pathlib import Path

from trl import SFTTrainer

from hf_delta import __version__
from hf_delta._compat.trl_state import ExtraState
from hf_delta.checkpoint import STATE_FILE, load_state, save_state
from hf_delta.resume import Resumable, batches, check_method, optimizer_settings, reading


class DeltaSFTTrainer(Resumable, ExtraState, SFTTrainer):
    """Drop-in for [`~trl.SFTTrainer`] that trains bit for bit like it.

    Under FSDP with `SHARDED_STATE_DICT` its checkpoints hold the adapter, and `save_model` writes an adapter or a whole model;
    TRL's write neither. Under FSDP2 a head that is trained beside an adapter gets the gradient of all processes.
    `resume_from_checkpoint=True` takes the newest checkpoint that was written to its end, and the log goes on as if the run had
    never stopped.
    """

    def save_extra_state(self, checkpoint: Path) -> None:
        metrics = self.running_metrics()
        if self.args.should_save:
            state = {
                "hf_delta": __version__,
                "method": self._method(),
                "settings": {},
                "layout": batches(self.args),
                "optimizer": optimizer_settings(self.args),
                "metrics": metrics,
            }
            save_state(checkpoint / STATE_FILE, state)

    def load_extra_state(self, checkpoint: Path) -> None:
        path = checkpoint / STATE_FILE
        if not path.exists():  # of TRL
            return
        state = load_state(path)
        check_method(path, state, self._method(), {})
        with reading(path):
            self.load_running_metrics(state["metrics"])

    def _method(self) -> dict[str, str]:
        return {"loss_type": self.args.loss_type}
