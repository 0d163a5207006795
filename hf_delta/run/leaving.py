"""A run that is told to leave while it trains: SIGTERM, as spot machines and schedulers send it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

# What a shell says of a process that SIGTERM ended; schedulers start such a job again.
EXIT_STATUS = 128 + signal.SIGTERM


class Stopped(Exception):
    """A run was told to leave, and left with a checkpoint of its last step; the message says where."""


class StopOnSigterm(TrainerCallback):
    """Saves and stops all processes at the end of the step in which one of them got SIGTERM.

    [`~transformers.TrainingArguments.enable_jit_checkpoint`] lets each process decide by its own clock, and those of one
    launch may then save in different steps; here they agree, with one small exchange a step. A process that is killed
    before the step ends has its last checkpoint.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The trainer's.

    Attributes:
        stopped (`bool`): Whether training ended early, with a checkpoint of its last step.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.stopped = False
        self._told = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM ends the training and not the process."""
        if threading.current_thread() is not threading.main_thread():
            # Only there can signals be handled.
            yield
            return
        before = signal.signal(signal.SIGTERM, self._tell)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._told:
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            self.stopped = True
            control.should_save = control.should_training_stop = True
            # There is little time.
            control.should_evaluate = False

    def _tell(self, signum: int, frame: Any) -> None:
        if not self._told:
            logger.warning("SIGTERM: the run saves at the end of this step, and stops.")
        self._told = True
