"""One progress bar for training, with the numbers one looks at beside it."""

from typing import Any

from transformers import ProgressCallback


# Name in the logs -> name beside the bar.
SHOWN = {"loss": "loss", "reward": "reward", "completions/mean_length": "length", "rewards/accuracies": "accuracy"}
# In policy gradients the loss is a means to a gradient; its value says nothing.
MEANINGLESS_WITH = {"loss": "reward"}


class TrainingProgress(ProgressCallback):
    """The bar of [`~transformers.ProgressCallback`] without a line of text for every log: those are in `trainer_state.json`."""

    def __init__(self):
        super().__init__()
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.training_bar is None:
            return
        logs = logs or {}
        for key, name in SHOWN.items():
            if key in logs and MEANINGLESS_WITH.get(key) not in logs:
                self.shown[name] = f"{float(logs[key]):.3g}"
        self.training_bar.set_postfix(self.shown, refresh=False)
