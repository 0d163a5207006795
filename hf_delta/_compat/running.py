"""Private names of transformers and TRL: what a trainer has summed up and not yet logged, which neither checkpoints."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback


# Private attributes that are read or written: of transformers' trainer, and of TRL's.
TRAINER_ATTRIBUTES: tuple[str, ...] = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
TRL_ATTRIBUTES: tuple[str, ...] = ("_metrics",)
# Of those trainers that count tokens themselves.
COUNTING_ATTRIBUTES: tuple[str, ...] = ("_total_train_tokens",)


class RunningMetrics(Trainer):
    """Mixin for trainers of TRL: with its state a resumed run logs what a run would have logged that never stopped."""

    def running_metrics(self) -> dict[str, Any]:
        """Tokens of the training so far, and of the log line to come the metrics and the sum of losses. Collective."""
        pending = {name: torch.tensor(values, dtype=torch.float64) for name, values in self._metrics["train"].items()}
        return {
            "pending": pending,
            "num_tokens": getattr(self, "_total_train_tokens", None),
            "loss": self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean().cpu(),
            "last_logged": self._globalstep_last_logged,
        }

    def load_running_metrics(self, state: dict[str, Any]) -> None:
        """Take over what [`RunningMetrics.running_metrics`] gave, on resume and before training begins."""
        for name, values in state["pending"].items():
            self._metrics["train"][name] = values.tolist()
        if state["num_tokens"] is not None:
            self._total_train_tokens = state["num_tokens"]
        self.add_callback(_GoesOnWithItsLogLine(self, state["loss"], state["last_logged"]))


class _GoesOnWithItsLogLine(TrainerCallback):
    """Puts the sum of losses back once transformers has set it to zero."""

    def __init__(self, trainer: Trainer, loss: torch.Tensor, last_logged: int):
        self.trainer, self.loss, self.last_logged = trainer, loss, last_logged

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.loss is not None:
            self.trainer._tr_loss += self.loss.to(self.trainer._tr_loss)
            # `train_loss` is a mean over the steps of this part, and what is put back is of steps before it.
            self.trainer._total_loss_scalar -= self.loss.item()
            self.trainer._globalstep_last_logged = self.last_logged
        # A trainer may train again.
        self.loss = None
