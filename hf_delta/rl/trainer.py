"""GRPO with weight rules over whole rollout batches, and with everything it knows in the checkpoint."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_delta import __version__
from hf_delta._compat.trl import GRPOHooks, gather_column
from hf_delta.checkpoint import (
    ROLLOUTS_FILE,
    STATE_FILE,
    check_state,
    load_state,
    newest_complete_checkpoint,
    save_state,
)
from hf_delta.errors import InputError
from hf_delta.rl.config import DeltaGRPOConfig, weight_rule
from hf_delta.rl.prompt_ids import with_prompt_ids
from hf_delta.rl.rewards import checked_reward
from hf_delta.rl.weights import WEIGHT_RULES, AdvantageTransform, RolloutBatch, combine_weights
from hf_delta.rl.weights.base import OPTIONAL_FIELDS, transform_name


logger = logging.getLogger(__name__)

DELTA_L_PAPER = {
    "title": "Delta L Normalization: Rethink Loss Aggregation in RLVR",
    "id": "2509.07558",
}


class DeltaGRPOTrainer(GRPOHooks):
    """
    Drop-in for [`~trl.GRPOTrainer`] that weights sequences over the whole rollout batch and resumes exactly.

    Example:

    ```python
    from hf_delta import DeltaGRPOConfig, DeltaGRPOTrainer

    trainer = DeltaGRPOTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=my_reward,
        args=DeltaGRPOConfig(output_dir="run", loss_type="delta_l", delta_l_alpha=0.75),
        train_dataset=dataset,
    )
    trainer.train()
    ```

    Args:
        *args, **kwargs:
            As for [`~trl.GRPOTrainer`]. With a plain [`~trl.GRPOConfig`] the trainer behaves like TRL's.
        advantage_transforms (`Sequence[AdvantageTransform]`, *optional*):
            Weight rules as objects, in addition to those that the config names by dotted path.

    Raises:
        `InputError`: a reward function fails or returns what is not a reward, no reward function gives a score, every
        completion of the first batch is masked as truncated, a weight rule returns what is no weight, or a checkpoint
        belongs to another method, another version, or is damaged.
    """

    _tag_names = ["trl", "grpo", "hf_delta"]
    _name = "GRPO (hf_delta)"

    def __init__(self, *args, advantage_transforms: Sequence[AdvantageTransform] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self.rollout_dropout = getattr(self.args, "rollout_dropout", True)
        self.advantage_transforms: list[AdvantageTransform] = [*self._configured_transforms(), *advantage_transforms]
        self._needs = frozenset().union(*map(_needs, self.advantage_transforms))
        if self.loss_type == "delta_l":
            # Dr.GRPO's constant denominator carries the weights: w_i * loss_i is the loss at w_i * A_i, exactly.
            self.loss_type = "dr_grpo"
            self._paper = DELTA_L_PAPER
        if "prompt_ids" in self._needs:
            if self.args.remove_unused_columns:
                raise InputError("A weight rule needs prompt ids; remove_unused_columns: true would remove them.")
            self.train_dataset = with_prompt_ids(self.train_dataset)
        self.reward_funcs = [checked_reward(f, n) for f, n in zip(self.reward_funcs, self.reward_func_names)]
        self._saw_rollouts = False

    def _configured_transforms(self) -> list[AdvantageTransform]:
        transforms = []
        if self.loss_type == "delta_l":
            if not isinstance(self.args, DeltaGRPOConfig):
                raise InputError("loss_type delta_l needs a DeltaGRPOConfig, and args is a plain GRPOConfig.")
            rule = WEIGHT_RULES["delta_l"]
            transforms.append(rule(alpha=self.args.delta_l_alpha, scope=self.args.delta_l_scope))
        kwargs = getattr(self.args, "advantage_transform_kwargs", None) or {}
        for path in getattr(self.args, "advantage_transforms", None) or []:
            rule = weight_rule(path)
            transforms.append(rule(**kwargs.get(path, {})) if isinstance(rule, type) else rule)
        return transforms

    # -- weights ----------------------------------------------------------------------------------------------------
    def on_rollouts(self, rollouts: dict[str, Any], rewards_per_func: torch.Tensor, rows: list[dict]) -> None:
        self._check_rollouts(rollouts, rewards_per_func)
        if not self.advantage_transforms:
            return
        batch = self._gather(rollouts, rewards_per_func, rows)
        weights = combine_weights(self.advantage_transforms, batch)
        first = self.accelerator.process_index * len(rows)
        local = weights[first : first + len(rows)].to(rollouts["advantages"])
        rollouts["advantages"] = rollouts["advantages"] * local
        used = weights[batch.lengths > 0]
        if len(used):
            spread = {"min": used.min(), "mean": used.mean(), "max": used.max(), "std": used.std(unbiased=False)}
            self.log_train_metrics({f"weights/{name}": value.item() for name, value in spread.items()})
        self.log_completion_column("weight", weights.tolist())

    def on_eval_rollouts(self, rollouts: dict[str, Any], rows: list[dict]) -> None:
        if self.advantage_transforms:
            # The table of completions holds rows of evaluations too, which have no weight.
            self.log_completion_column("weight", [None] * len(rows) * self.accelerator.num_processes)

    def _gather(self, rollouts: dict[str, Any], rewards_per_func: torch.Tensor, rows: list[dict]) -> RolloutBatch:
        """Collective: one all-gather of `(B, 2)` numbers, and one more for each optional field that a rule needs."""
        mask = rollouts["completion_mask"]
        if "tool_mask" in rollouts:
            mask = mask * rollouts["tool_mask"]
        advantages = rollouts["advantages"]
        lengths, advantages = self.accelerator.gather(torch.stack([mask.sum(1).to(advantages), advantages], 1)).T.cpu()
        rewards = rewards_per_func.cpu()
        reward = (rewards * self.reward_weights.cpu()).nansum(1)
        reward[rewards.isnan().all(1)] = torch.nan
        logps = None
        if "logps" in self._needs and (logps := rollouts.get("old_per_token_logps")) is not None:
            padded = self.accelerator.pad_across_processes(torch.stack([logps, mask.to(logps)], -1), dim=1)
            logps, mask = self.accelerator.gather(padded).cpu().unbind(-1)
        return RolloutBatch(
            group_ids=torch.arange(len(lengths)) // self.num_generations,
            lengths=lengths.long(),
            rewards=rewards,
            reward=reward,
            advantages=advantages,
            correct=reward > getattr(self.args, "correctness_threshold", 0.5),
            step=self.state.global_step,
            prompt_ids=gather_column(rows, "prompt_id") if "prompt_ids" in self._needs else None,
            logps=logps,
            mask=None if logps is None else mask.long(),
        )

    def _check_rollouts(self, rollouts: dict[str, Any], rewards_per_func: torch.Tensor) -> None:
        if bool(rewards_per_func.isnan().all()):
            raise InputError(
                f"None of the reward functions ({', '.join(self.reward_func_names)}) gave a score to any of the "
                f"{len(rewards_per_func)} completions of this batch: every one returned None for every row."
            )
        first = not self._saw_rollouts and self.state.global_step == 0
        self._saw_rollouts = True
        if rollouts["num_items_in_batch"].item() > 0:
            return
        message = (
            f"Every one of the {len(rewards_per_func)} completions was cut at max_completion_length = "
            f"{self.max_completion_length} tokens, and mask_truncated_completions leaves none to train on."
        )
        if first:
            raise InputError(f"{message} Raise max_completion_length, or write mask_truncated_completions: false.")
        # Far into a run one such batch is bad luck, and the run is worth more than the step.
        logger.warning("%s This step changes nothing.", message)

    # -- checkpoints ------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As [`~transformers.Trainer.train`]; `True` resumes from the newest checkpoint that was written to its end."""
        if resume_from_checkpoint is True:
            newest = newest_complete_checkpoint(self.args.output_dir, self.accelerator.num_processes)
            if newest is None:
                raise InputError(f"resume_from_checkpoint: {self.args.output_dir} holds no complete checkpoint.")
            resume_from_checkpoint = str(newest)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_extra_state(self, checkpoint: Path) -> None:
        if self.window_is_open and self.buffered_rollouts is not None:
            save_state(checkpoint / ROLLOUTS_FILE.format(rank=self.accelerator.process_index), self.buffered_rollouts)
        if self.args.should_save:
            state = {
                "hf_delta": __version__,
                "method": self._method(),
                "settings": self._settings(),
                "layout": self._layout(),
                "generation": self.generation_state(),
                "transforms": [_state_of(t) for t in self.advantage_transforms],
            }
            save_state(checkpoint / STATE_FILE, state)

    def load_extra_state(self, checkpoint: Path) -> None:
        path = checkpoint / STATE_FILE
        if not path.exists():
            logger.warning("%s is not there: weight rules and the generation window start afresh.", path)
            return
        state = load_state(path)
        self._check_method(path, state)
        for transform, saved in zip(self.advantage_transforms, state["transforms"]):
            if saved:
                transform.load_state_dict(saved)
        if not list(checkpoint.glob("rng_state*.pth")):
            logger.warning(
                "%s holds a model only (save_only_model): the run goes on from it, but not as if it had never stopped.",
                checkpoint,
            )
        self.advance_sampler()
        if state["layout"] == self._layout():
            self.load_generation_state(state["generation"])
            if self.window_is_open:
                self.buffered_rollouts = load_state(
                    checkpoint / ROLLOUTS_FILE.format(rank=self.accelerator.process_index)
                )
        elif state["generation"]["step"] % state["layout"]["steps_per_window"]:
            raise InputError(
                f"{checkpoint} was saved with rollouts still to be trained on, under {state['layout']}; this run has "
                f"{self._layout()}. Resume with the same values, or from a checkpoint at the end of a generation window."
            )

    def _method(self) -> dict[str, Any]:
        return {
            "loss_type": self.args.loss_type,
            "advantage_transforms": [transform_name(t) for t in self.advantage_transforms],
        }

    def _settings(self) -> dict[str, Any]:
        """What may be changed on resume, and is said when it is."""
        return {key: getattr(self.args, key, None) for key in ("delta_l_alpha", "delta_l_scope")}

    def _layout(self) -> dict[str, int]:
        """What must be equal for a half-used generation window to be taken up again."""
        return {
            "num_processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "num_generations": self.num_generations,
            "steps_per_window": self.steps_per_window,
        }

    def _check_method(self, path: Path, state: dict[str, Any]) -> None:
        differing = [f"{key}: {state['method'][key]!r} there, {value!r} here" for key, value in self._method().items()
                     if state["method"][key] != value]  # fmt: skip
        if differing:
            raise InputError(
                f"{path} belongs to another method ({'; '.join(differing)}). Resume with the recipe that wrote it, or "
                "start a new run in another output_dir."
            )
        for key, value in self._settings().items():
            if state["settings"][key] != value:
                logger.warning(
                    "%s was saved with %s %s; the run goes on with %s.", path, key, state["settings"][key], value
                )


def _needs(transform: AdvantageTransform) -> frozenset[str]:
    needs = frozenset(getattr(transform, "needs", ()))
    if unknown := needs - OPTIONAL_FIELDS:
        raise InputError(
            f"The advantage transform {transform_name(transform)} needs {', '.join(sorted(unknown))}; it can ask for "
            f"{' and '.join(sorted(OPTIONAL_FIELDS))}, and the other fields of a RolloutBatch are always there."
        )
    return needs


def _state_of(transform: AdvantageTransform) -> Any:
    state = getattr(transform, "state_dict", dict)()
    try:
        check_state(state)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"state_dict() of the advantage transform {transform_name(transform)} cannot be saved: {error}"
        ) from error
    return state
