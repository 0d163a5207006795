"""GRPO with weight rules over whole rollout batches, and with everything it knows in the checkpoint."""

import inspect
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from trl import GRPOTrainer

from hf_delta._compat.fsdp import keep_outputs
from hf_delta._compat.trl import gather_column, gather_rows
from hf_delta._compat.vllm import vllm_mismatch
from hf_delta.adapters.stream import check_streamable, has_adapters, merged_weights
from hf_delta.errors import InputError
from hf_delta.rl.advantages import group_sums, grouped_advantages, mean_surrogate_loss
from hf_delta.rl.allocation import AllocationRule
from hf_delta.rl.configured import Rules
from hf_delta.rl.curriculum import Plan
from hf_delta.rl.merged import merged_rollouts
from hf_delta.rl.resume import ResumableGRPO
from hf_delta.rl.rewards import checked_reward, correct_rollouts
from hf_delta.rl.weights import AdvantageTransform, DeltaLWeights, RolloutBatch, combine_weights


logger = logging.getLogger(__name__)


class DeltaGRPOTrainer(ResumableGRPO):
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
            As for [`~trl.GRPOTrainer`]. With a plain [`~trl.GRPOConfig`] the trainer behaves like TRL's, but that FSDP2 with
            mixed precision does not round log-probabilities to it.
        advantage_transforms (`Sequence[AdvantageTransform]`, *optional*):
            Weight rules as objects, in addition to those that the config names by dotted path.
        rollout_allocation (`AllocationRule`, *optional*):
            An allocation rule as an object, instead of one that the config names.

    Raises:
        `InputError`: vLLM is of a version that TRL does not support, or cannot hold the weights with this adapter in them;
        rules and data do not fit each other, a reward function fails or returns what is not a reward, no
        reward function gives a score, every completion of the first batch is masked as truncated, a weight rule returns
        what is no weight, or a checkpoint belongs to another method, another version, or is damaged.
    """

    _tag_names = ["trl", "grpo", "hf_delta"]
    _name = "GRPO (hf_delta)"

    def __init__(
        self,
        *args,
        advantage_transforms: Sequence[AdvantageTransform] = (),
        rollout_allocation: AllocationRule | None = None,
        **kwargs,
    ):
        # What is wrong with rules and data is said before a model is loaded.
        given = inspect.signature(GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments
        if getattr(given.get("args"), "use_vllm", False) and (mismatch := vllm_mismatch()):
            raise InputError(mismatch)
        rules = Rules(given.get("args"), advantage_transforms, rollout_allocation)
        self.advantage_transforms: list[AdvantageTransform] = rules.transforms
        self._needs = rules.needs
        dataset = rules.prepared(given.get("train_dataset"))
        super().__init__(*args, **kwargs)
        # Without a dataset TRL makes one for an environment.
        self.train_dataset = rules.prepared(self.train_dataset) if dataset is None else dataset
        self.curriculum = rules.curriculum(self.train_dataset, self.reward_func_names)
        self.rollout_dropout = getattr(self.args, "rollout_dropout", True)
        if self.loss_type == "delta_l":
            # Dr.GRPO's constant denominator carries the weights: w_i * loss_i is the loss at w_i * A_i, exactly.
            self.loss_type = "dr_grpo"
            self._paper = dict(zip(("title", "id"), DeltaLWeights.paper))
        self.single_rows = self.curriculum is not None and self.curriculum.allocation is not None
        self.watch_losses = "losses" in self._needs
        self._set_up_merging()
        if self.use_vllm and has_adapters(self.model):
            check_streamable(self.model)
            self.send_to_vllm(merged_weights)
        self.reward_funcs = [checked_reward(f, n) for f, n in zip(self.reward_funcs, self.reward_func_names)]
        self._saw_rollouts = False
        self._plan: Plan | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # Of rounded log-probabilities, no ratio would lie between 1 and 1.016.
            keep_outputs(self.accelerator.state.fsdp_plugin)

    def _set_up_merging(self) -> None:
        if not getattr(self.args, "merged_rollouts", False):
            return
        if not is_peft_model(self.model):
            logger.warning("merged_rollouts: there is no adapter to merge, so that it changes nothing.")
        if self.use_vllm:
            logger.warning("merged_rollouts: vLLM generates with merged weights anyway, so that this changes nothing.")
        elif self.rollout_func is not None:
            logger.warning("merged_rollouts: a rollout_func generates by itself, so that this changes nothing.")

    # -- rollouts ---------------------------------------------------------------------------------------------------
    def before_rollouts(self, rows: list[dict]) -> list[dict]:
        """The rows of the prompts that the plan gives rollouts to: as many as there were, on every rank."""
        if self.curriculum is None:
            return rows
        first = self.accelerator.process_index * len(rows)
        firsts = [row for place, row in enumerate(rows) if (first + place) % self.num_generations == 0]
        if not self.single_rows:
            # Rows stay where they are, so that the other ranks need no more than the names of things.
            firsts = [{k: row[k] for k in self.curriculum.columns if k in row} for row in firsts]
        prompts = gather_rows(firsts)
        self._plan = self.curriculum.plan(prompts, len(rows) * self.accelerator.num_processes)
        if not self.single_rows:
            return rows
        return [dict(prompts[i]) for i in self._plan.group_ids[first : first + len(rows)].tolist()]

    def rollout_context(self) -> AbstractContextManager:
        if not getattr(self.args, "merged_rollouts", False):
            return nullcontext()
        return merged_rollouts(self.accelerator.unwrap_model(self.model))

    # -- weights ----------------------------------------------------------------------------------------------------
    def on_rollouts(self, rollouts: dict[str, Any], rewards_per_func: torch.Tensor, rows: list[dict]) -> None:
        self._check_rollouts(rollouts, rewards_per_func)
        if self.curriculum is None and not self.advantage_transforms:
            return
        self._regroup(rollouts, rewards_per_func, len(rows))
        batch = self._gather(rollouts, rewards_per_func, rows)
        weights = combine_weights(self.advantage_transforms, batch)
        if batch.row_weights is not None:
            weights = weights * batch.row_weights.float()
        if self.watch_losses:
            # These travel with their rows through TRL's shuffling and splitting.
            rollouts["plain_advantages"] = rollouts["advantages"]
            rollouts["difficulty_groups"] = self._local(batch.groups, len(rows)).to(self.accelerator.device)
        rollouts["advantages"] = rollouts["advantages"] * self._local(weights, len(rows)).to(rollouts["advantages"])
        self._log_weights(batch, weights)
        if self.curriculum is not None:
            self.curriculum.learn(self._plan, batch.judged, batch.correct)

    def _local(self, values: torch.Tensor, size: int) -> torch.Tensor:
        """This rank's part of what was gathered, or computed from what was gathered."""
        first = self.accelerator.process_index * size
        return values[first : first + size]

    def _regroup(self, rollouts: dict[str, Any], rewards_per_func: torch.Tensor, size: int) -> None:
        """Advantages on the groups that there are, where they are not all of TRL's size."""
        if self._plan is None or bool((self._plan.counts == self.num_generations).all()):
            return
        advantages, zero_std = grouped_advantages(
            rewards_per_func.cpu(),
            self.reward_weights.cpu(),
            self._plan.group_ids,
            self.scale_rewards,
            self.multi_objective_aggregation,
        )
        rollouts["advantages"] = self._local(advantages, size).to(rollouts["advantages"])
        self.replace_logged_advantages(advantages, zero_std)

    def _log_weights(self, batch: RolloutBatch, weights: torch.Tensor) -> None:
        used = weights[batch.lengths > 0]
        if len(used):
            spread = {"min": used.min(), "mean": used.mean(), "max": used.max(), "std": used.std(unbiased=False)}
            self.log_train_metrics({f"weights/{name}": value.item() for name, value in spread.items()})
        if self.curriculum is not None:
            self.log_train_metrics(self.curriculum.metrics(self._plan))
        for transform in self.advantage_transforms:
            if hasattr(transform, "log_metrics"):
                self.log_train_metrics(transform.log_metrics(batch))
        self.log_completion_column("weight", weights.tolist())

    def on_loss(self, rows: dict[str, Any], logps: torch.Tensor) -> None:
        """Surrogate losses of the window's micro-batches, summed by difficulty group, for the rules that ask."""
        mask = rows["completion_mask"] * rows.get("tool_mask", 1)
        losses = mean_surrogate_loss(
            logps,
            rows.get("old_per_token_logps", logps),
            rows["plain_advantages"],
            mask,
            self.epsilon_low,
            self.epsilon_high,
        )
        size = len(self.curriculum.group_names)
        has_tokens = (mask.sum(1) > 0).float()
        values = torch.stack(
            [group_sums(v, rows["difficulty_groups"], size) for v in (losses * has_tokens, has_tokens)]
        )
        self.window_losses = values if self.window_losses is None else self.window_losses + values
        if self.window_ends:
            sums, counts = self.accelerator.reduce(self.window_losses, "sum").cpu().double()
            self.window_losses = None
            for transform in self.advantage_transforms:
                if "losses" in getattr(transform, "needs", ()):
                    transform.on_losses(sums, counts)

    def on_eval_rollouts(self, rollouts: dict[str, Any], rows: list[dict]) -> None:
        if self.advantage_transforms or self.curriculum is not None:
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
        judged, correct = correct_rollouts(
            rewards,
            reward,
            self.reward_func_names,
            getattr(self.args, "correct_threshold", None),
            getattr(self.args, "correct_reward_func", None),
            strict=self.curriculum is not None,
        )
        plan, group_ids = self._plan, torch.arange(len(lengths)) // self.num_generations
        if plan is not None:
            group_ids = plan.group_ids
        return RolloutBatch(
            group_ids=group_ids,
            lengths=lengths.long(),
            rewards=rewards,
            reward=reward,
            advantages=advantages,
            correct=correct,
            judged=judged,
            step=self.state.global_step,
            prompt_ids=gather_column(rows, "prompt_id") if "prompt_ids" in self._needs else None,
            logps=logps,
            mask=None if logps is None else mask.long(),
            row_weights=plan.weights[group_ids] if self.single_rows else None,
            groups=None if plan is None else plan.groups[group_ids],
            group_names=() if plan is None else plan.group_names,
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
