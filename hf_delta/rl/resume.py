"""What a run of GRPO knows besides the model: written into every checkpoint, read back and checked on resume."""

import logging
from pathlib import Path
from typing import Any

import torch

from hf_delta import __version__
from hf_delta._compat.trl import GRPOHooks
from hf_delta.checkpoint import ROLLOUTS_FILE, STATE_FILE, load_state, save_state
from hf_delta.errors import InputError
from hf_delta.resume import Resumable, batches, check_method, optimizer_settings, reading, state_of
from hf_delta.rl.curriculum import PASS_RATE, Curriculum
from hf_delta.rl.weights import AdvantageTransform
from hf_delta.rl.weights.base import transform_name


logger = logging.getLogger(__name__)


class ResumableGRPO(Resumable, GRPOHooks):
    """GRPO whose weight rules, curriculum and open generation window are in its checkpoints.

    Attributes:
        advantage_transforms (`list[AdvantageTransform]`): Weight rules.
        curriculum ([`Curriculum`], *optional*): What is learnt about prompts.
        window_losses (`torch.Tensor`, *optional*): Sums of this rank over the open window, `(2, K)`.
    """

    advantage_transforms: list[AdvantageTransform]
    curriculum: Curriculum | None = None
    window_losses: torch.Tensor | None = None

    def save_extra_state(self, checkpoint: Path) -> None:
        if self.window_is_open and self.buffered_rollouts is not None:
            window = {
                "rollouts": self.buffered_rollouts,
                "losses": self.window_losses,
                "log": self.completion_log(),
            }
            save_state(checkpoint / ROLLOUTS_FILE.format(rank=self.accelerator.process_index), window)
        metrics = self.running_metrics()
        if self.args.should_save:
            state = {
                "hf_delta": __version__,
                "method": self._method(),
                "settings": self._settings(),
                "layout": self._layout(),
                "optimizer": optimizer_settings(self.args),
                "generation": self.generation_state(),
                "metrics": metrics,
                "curriculum": None
                if self.curriculum is None
                else state_of(self.curriculum, "rollout allocation rule"),
                "transforms": [
                    state_of(t, f"advantage transform {transform_name(t)}") for t in self.advantage_transforms
                ],
            }
            save_state(checkpoint / STATE_FILE, state)

    def load_extra_state(self, checkpoint: Path) -> None:
        path = checkpoint / STATE_FILE
        if not path.exists():
            logger.warning("%s is not there: weight rules and the generation window start afresh.", path)
            return
        state = load_state(path)
        check_method(path, state, self._method(), self._settings())
        with reading(path):
            self._load_state(checkpoint, state)

    def _load_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        self.load_running_metrics(state["metrics"])
        for transform, saved in zip(self.advantage_transforms, state["transforms"]):
            if saved:
                transform.load_state_dict(saved)
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state["curriculum"])
        if not list(checkpoint.glob("rng_state*.pth")):
            logger.warning(
                "%s holds a model only (save_only_model): the run goes on from it, but not as if it had never stopped.",
                checkpoint,
            )
        self.advance_sampler()
        if state["layout"] == self._layout():
            self.load_generation_state(state["generation"])
            if self.window_is_open:
                window = load_state(checkpoint / ROLLOUTS_FILE.format(rank=self.accelerator.process_index))
                self.buffered_rollouts, self.window_losses = window["rollouts"], window["losses"]
                self.load_completion_log(window["log"])
        elif state["generation"]["step"] % state["layout"]["steps_per_window"]:
            there, here = state["layout"], self._layout()
            differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
            raise InputError(
                f"{checkpoint} was saved with rollouts still to be trained on, under "
                f"{', '.join(f'{key} {there.get(key)}' for key in differing)}; this run has "
                f"{', '.join(f'{key} {here.get(key)}' for key in differing)}. Resume with the same values, or from a checkpoint at the end of a generation window."
            )

    def _method(self) -> dict[str, Any]:
        curriculum = self.curriculum
        return {
            "loss_type": self.args.loss_type,
            "advantage_transforms": [transform_name(t) for t in self.advantage_transforms],
            "rollout_allocation": transform_name(curriculum.allocation) if self.single_rows else None,
            "prompt_groups": None if curriculum is None else curriculum.group_column or PASS_RATE,
        }

    def _settings(self) -> dict[str, Any]:
        """What may be changed on resume, and is said when it is."""
        keys = ("delta_l_alpha", "delta_l_scope", "rollout_weighting", "correct_threshold", "correct_reward_func")
        keys += ("prompt_weighting_kwargs", "rollout_allocation_kwargs", "difficulty_kwargs")
        return {key: getattr(self.args, key, None) for key in keys}

    def _layout(self) -> dict[str, Any]:
        """What must be equal for a half-used generation window to be taken up again."""
        return {
            **batches(self.args),
            "num_generations": self.num_generations,
            "steps_per_generation": self.args.steps_per_generation,
            "num_iterations": self.num_iterations,
            "steps_per_window": self.steps_per_window,
        }
