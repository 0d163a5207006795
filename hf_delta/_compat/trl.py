"""Private names of TRL: the seams of its trainers that hf_delta uses, their recorded signatures, and hooks over them.

Nothing else in the package names a private attribute of TRL. [`GRPOHooks`] turns the seams into a few methods with plain
names, so that a new TRL release is one file's work; `tests/test_seams.py` compares the signatures with the installed TRL.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from packaging.specifiers import SpecifierSet

from hf_delta._compat.versions import require_supported


SUPPORTED_TRL = SpecifierSet(">=1.16,<1.17")


def require_supported_trl(installed: str | None = None) -> None:
    """
    Raises:
        `ImportError`: the installed TRL is outside the tested range.
    """
    require_supported("trl", "TRL", SUPPORTED_TRL, installed)


require_supported_trl()

# After the version check, which has the better message.
from trl import GRPOTrainer  # noqa: E402
from trl.trainer.utils import RepeatSampler  # noqa: E402

from hf_delta._compat.reference import ReferenceRepair, base_kept, only_policy_is_emptied  # noqa: E402
from hf_delta._compat.trl_state import ExtraState  # noqa: E402
from hf_delta._compat.trl_vllm import Weights, dense_engine, send  # noqa: E402
from hf_delta._compat.trl_window import WindowState  # noqa: E402


# Parameters of each private method that is overridden or called, as of TRL 1.16.
SEAMS: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate_single_turn": (
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_compute_loss": ("self", "model", "inputs"),
    "_get_per_token_logps_and_entropies": (
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ),
    "_get_train_sampler": ("self", "dataset"),
}

# Private attributes that are read or written.
ATTRIBUTES: tuple[str, ...] = ("_metrics", "_logs", "_step", "_buffered_inputs")

# Attributes of TRL's sampler that a resumed run needs.
SAMPLER_ATTRIBUTES: tuple[str, ...] = ("shuffle", "num_samples", "generator")

# Values of `loss_type` that TRL's `GRPOTrainer` implements. TRL finds a wrong one only after the first generation.
GRPO_LOSS_TYPES: tuple[str, ...] = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


class GRPOHooks(WindowState, ExtraState, GRPOTrainer, ReferenceRepair):
    """`GRPOTrainer` whose seams call methods with plain names; with no hook overridden it trains bit for bit like TRL's.

    As in [`~hf_delta._compat.trl_dpo.DPOHooks`], the reference of a trained adapter is a true copy of it.

    Hooks, all optional:
        `before_rollouts(rows)`: before each training generation; may hand as many other rows to it.
        `on_rollouts(rollouts, rewards_per_func, rows)`: after each training generation, may edit `rollouts` in place.
        `on_eval_rollouts(rollouts, rows)`: after each generation of an evaluation.
        `rollout_context()`: a context manager around generation with transformers.
        `on_loss(rows, logps)`: with `watch_losses`, after each loss of training, with one micro-batch of the rollouts and the
            log-probabilities `(B, T)` under the policy as it is.
        and those of [`ExtraState`].
    """

    rollout_dropout: bool = True
    # Whether rows of one prompt may be apart or of another number than `num_generations`, as a rule of budgets makes them.
    single_rows: bool = False
    watch_losses: bool = False

    def __init__(self, model, *args, **kwargs):
        with base_kept(model), dense_engine(), only_policy_is_emptied(self):
            super().__init__(model, *args, **kwargs)

    def before_rollouts(self, rows: list[dict]) -> list[dict]:
        return rows

    def rollout_context(self) -> AbstractContextManager:
        return nullcontext()

    def on_loss(self, rows: dict[str, Any], logps: torch.Tensor) -> None:
        pass

    def on_rollouts(self, rollouts: dict[str, Any], rewards_per_func: torch.Tensor, rows: list[dict]) -> None:
        pass

    def on_eval_rollouts(self, rollouts: dict[str, Any], rows: list[dict]) -> None:
        pass

    # -- what the hooks may use -------------------------------------------------------------------------------------
    def log_train_metrics(self, metrics: dict[str, float]) -> None:
        """Add values to the metrics of the next log line, averaged like TRL's own."""
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def log_completion_column(self, name: str, values: list) -> None:
        """Add a column, one value per sequence of the whole generation batch, to the table of `log_completions`."""
        self._logs["extra"][name].extend(values)

    def replace_logged_advantages(self, advantages: torch.Tensor, zero_std: torch.Tensor) -> None:
        """Put the right advantages `(N,)` into the log of the generation that just ended, and what TRL says of their deviation."""
        # The log holds the last generation batch and no more.
        self._logs["advantages"].extend(advantages.tolist())
        self._metrics["train"]["frac_reward_zero_std"][-1] = zero_std.float().mean().item()

    def send_to_vllm(self, weights: Callable[[torch.nn.Module, torch.device], Weights]) -> None:
        """Have TRL send vLLM the names and tensors of `weights(model, device)`, instead of merging the adapter in place."""
        send(self.vllm_generation, weights)

    def advance_sampler(self) -> None:
        """Move TRL's sampler on to the epoch in which the run resumes; in a new process it starts over with the first."""
        sampler = self._train_sampler
        # A streaming dataset has no sampler, and a subclass may have its own.
        if not isinstance(sampler, RepeatSampler) or not sampler.shuffle:
            return
        micro_steps = len(sampler) // self.args.generation_batch_size
        steps_per_epoch = max(math.ceil(micro_steps / self.args.gradient_accumulation_steps), 1)
        for _ in range(self.state.global_step // steps_per_epoch):
            torch.randperm(sampler.num_samples, generator=sampler.generator)

    # -- seams ------------------------------------------------------------------------------------------------------
    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        if self.model.training:
            inputs = self.before_rollouts(inputs)
        rollouts = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.on_rollouts(rollouts, self._rewards_per_func, inputs)
        else:
            self.on_eval_rollouts(rollouts, inputs)
        return rollouts

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> torch.Tensor:
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self.single_rows and self.model.training:
            # TRL sends vLLM each `num_generations`-th row, and asks for that many completions of it.
            num_generations = 1
        context = nullcontext() if self.use_vllm else self.rollout_context()
        with dropout_off(self.model, enabled=not (self.rollout_dropout or self.use_vllm)), context:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
            )

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self.watch_losses and torch.is_grad_enabled():
            self._watched_logps = found[0].detach()
        return found

    def _compute_loss(self, model, inputs) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        if self.watch_losses and self.model.training:
            self.on_loss(inputs, self._watched_logps)
        return loss

    _train_sampler = None

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler


@contextmanager
def dropout_off(model: torch.nn.Module, enabled: bool = True) -> Iterator[None]:
    """Put every module in evaluation mode for a while, then give each its own mode back."""
    modes = {module: module.training for module in model.modules()} if enabled else {}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def gather_column(rows: list[dict], column: str) -> list[str]:
    """Values of one column of this rank's rows as strings, gathered over all ranks in sampler order."""
    return gather_object([str(row[column]) for row in rows])


def gather_rows(rows: list[dict]) -> list[dict]:
    """Rows of a dataset, gathered over all ranks in sampler order."""
    return gather_object(rows)
