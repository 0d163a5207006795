"""Private names of TRL: what its GRPO trainer holds of a generation window, and does not checkpoint."""

import math
from typing import Any

import torch


class WindowState:
    """Mixin for `GRPOTrainer`: its place in the generation window, the rollouts of it, and how they are shown."""

    @property
    def window_ends(self) -> bool:
        """Whether the micro-step in progress is the last one of its generation window."""
        return (self._step + 1) % self.steps_per_window == 0

    @property
    def steps_per_window(self) -> int:
        """Micro-steps that use one generation batch: `steps_per_generation * num_iterations`."""
        return self.args.steps_per_generation * self.num_iterations

    @property
    def window_is_open(self) -> bool:
        """Whether rollouts already generated are still to be trained on."""
        return self._step % self.steps_per_window != 0

    @property
    def buffered_rollouts(self) -> list[dict[str, Any]] | None:
        """This rank's rollouts of the open window, one dict per micro-batch."""
        return self._buffered_inputs

    @buffered_rollouts.setter
    def buffered_rollouts(self, rollouts: list[dict[str, Any]]) -> None:
        device = self.accelerator.device
        self._buffered_inputs = [
            {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
            for batch in rollouts
        ]

    def generation_state(self) -> dict[str, Any]:
        """What TRL does not checkpoint: the position in the generation window."""
        return {"step": self._step}

    def load_generation_state(self, state: dict[str, Any]) -> None:
        """Counterpart of [`generation_state`]."""
        self._step = state["step"]

    def completion_log(self) -> dict[str, Any] | None:
        """What `log_completions` shows of the open window, without images; `None` if nothing is shown."""
        if not self.log_completions:
            return None
        return {
            "text": {name: [plain(v) for v in self._logs[name]] for name in ("prompt", "completion")},
            "advantages": torch.tensor([*self._logs["advantages"]], dtype=torch.float64),
            "rewards": {n: torch.tensor([*v], dtype=torch.float64) for n, v in self._logs["rewards"].items()},
            "extra": {name: [plain(v) for v in values] for name, values in self._logs["extra"].items()},
        }

    def load_completion_log(self, log: dict[str, Any] | None) -> None:
        """Counterpart of [`completion_log`]."""
        if log is None or not self.log_completions:
            return
        for name, values in log["text"].items():
            self._logs[name].extend(values)
        self._logs["advantages"].extend(log["advantages"].tolist())
        for kind in ("rewards", "extra"):
            for name, values in log[kind].items():
                self._logs[kind][name].extend(values.tolist() if isinstance(values, torch.Tensor) else values)


def plain(value: Any) -> Any:
    """A value of a log as JSON can hold it: what is no text, number, list or dict is what its table would show."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value)
