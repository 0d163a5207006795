"""Private names of TRL's DPO trainer: the seams that hf_delta uses, their recorded signatures, and hooks over them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast, is_peft_model
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import use_adapter

from hf_delta._compat.fsdp import keep_outputs
from hf_delta._compat.kernels import head_arguments
from hf_delta._compat.reference import REFERENCE, ReferenceRepair, base_kept, only_policy_is_emptied
from hf_delta._compat.token_head import MASK_NETWORK, add_token_head, head_of_adapter
from hf_delta._compat.trl import require_supported_trl
from hf_delta._compat.trl_lists import prepare_lists
from hf_delta._compat.trl_state import ExtraState


__all__ = ["ATTRIBUTES", "DPO_LOSS_TYPES", "SEAMS", "DPOHooks", "DataCollatorForPreference"]

require_supported_trl()

# Values of `loss_type` that TRL's `DPOTrainer` implements. TRL finds a wrong one only when it computes the first loss.
DPO_LOSS_TYPES: tuple[str, ...] = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)

# Parameters of each private method that is overridden or called, as of TRL 1.16.
SEAMS: dict[str, tuple[str, ...]] = {
    "_compute_loss": ("self", "model", "inputs", "return_outputs"),
    "_prepare_dataset": ("self", "dataset", "processing_class", "args", "dataset_name"),
    "_save": ("self", "output_dir", "state_dict"),
    "_set_signature_columns_if_needed": ("self",),
}

# Private attributes that are read or written.
ATTRIBUTES: tuple[str, ...] = ("_metrics", "_total_train_tokens", "_tp_size", "_tokenizer")


class DPOHooks(ExtraState, DPOTrainer, ReferenceRepair):
    """`DPOTrainer` whose seams call methods with plain names; with no hook overridden it trains bit for bit like TRL's.

    A trained adapter is held to a true copy of itself.

    Hooks, all optional, besides those of [`ExtraState`]:
        `replaces_loss`: whether `loss_of_batch` computes the loss, and not TRL.
        `loss_of_batch(model, inputs)`: the loss of one batch of the collator.
        `prepared_rows(dataset, name, tokenized)`: what TRL is to train on; `tokenized(dataset)` is TRL's own way, and
            `tokenized(dataset, lists=True)` the same for lists of completions.
        `extra_columns`: columns that the collator wants besides TRL's.
    """

    replaces_loss: bool = False
    extra_columns: tuple[str, ...] = ()

    def __init__(self, model, *args, **kwargs):
        with base_kept(model), only_policy_is_emptied(self):
            super().__init__(model, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.replaces_loss and self.is_fsdp_enabled:
            keep_outputs(self.accelerator.state.fsdp_plugin)

    def loss_of_batch(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        raise RuntimeError("replaces_loss is set, and there is no loss_of_batch")

    def prepared_rows(self, dataset: Any, name: str, tokenized: Callable[[Any], Any]) -> Any:
        return tokenized(dataset)

    # -- what the hooks may use -------------------------------------------------------------------------------------
    @property
    def mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def plain_model(self) -> torch.nn.Module:
        """The policy without the wrappers of accelerate and of PEFT."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if is_peft_model(model) else model

    @property
    def plain_reference(self) -> torch.nn.Module:
        """The reference without wrappers: the policy's own base where adapters are switched off for it."""
        return self.plain_model if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)

    @property
    def reference_adapter(self) -> str | None:
        """Adapter that is the reference, under PEFT; `None` is the base model."""
        return REFERENCE if REFERENCE in self.accelerator.unwrap_model(self.model).peft_config else None

    def add_token_heads(self, logps_kernel: str) -> None:
        """Make policy and reference give what [`~hf_delta._compat.token_head.add_token_head`] says."""
        if self.ref_model is None:
            add_token_head(self.plain_model, logps_kernel, self._head_of_adapter)
            return
        add_token_head(self.plain_model, logps_kernel, self._head_of_reference)
        add_token_head(self.plain_reference, logps_kernel)

    def _head_of_adapter(self) -> dict:
        return head_of_adapter(self.accelerator.unwrap_model(self.model), self.reference_adapter) or {}

    def _head_of_reference(self) -> dict:
        return head_arguments(self.plain_reference, "ref_")

    @property
    def mask_network(self) -> torch.nn.Module | None:
        """Network that is trained with the policy, inside of its forward pass."""
        return getattr(self.plain_model, MASK_NETWORK, None)

    def attach_mask_network(self, network: torch.nn.Module) -> None:
        """Make a network a child of the policy, so that it is trained with it; as it is in the first process."""
        network.to(self.accelerator.device)
        # DDP and DeepSpeed do so themselves. Of FSDP2 each process would put its own numbers into its shard.
        for parameter in network.parameters():
            broadcast(parameter.detach())
        self.plain_model.add_module(MASK_NETWORK, network.to(self.plain_model.device))

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The reference, without gradients: a model to call, and the policy again once the context is left."""
        context = nullcontext()
        if self.ref_model is None:
            context = self._reference_adapter_only()
        checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing, context, self.accelerator.autocast():
            yield self.model if self.ref_model is None else self.ref_model

    @contextmanager
    def _reference_adapter_only(self) -> Iterator[None]:
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=self.reference_adapter):
            # PEFT has frozen them for the while. FSDP2 learns in its first forward, which may be this one, what is trained,
            # and would not know the dtype of gradients.
            for parameter in trained:
                parameter.requires_grad_(True)
            yield

    def model_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What policy and reference are called with: tokens, and labels `-100` outside of completions."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        names = ("input_ids", "attention_mask")
        return {name: inputs[name] for name in names} | {"labels": labels, "use_cache": False, "fused_lm_head": True}

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Add values to the metrics of the next log line, averaged like TRL's own."""
        for name, value in metrics.items():
            self._metrics[self.mode][name].append(value)

    def count_tokens(self, attention_mask: torch.Tensor) -> None:
        """Count the tokens of a batch of training, as TRL's loss does."""
        if self.mode == "train":
            tokens = self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        self._metrics[self.mode]["num_tokens"] = [self._total_train_tokens]

    # -- seams ------------------------------------------------------------------------------------------------------
    def _compute_loss(self, model, inputs, return_outputs):
        if not self.replaces_loss:
            return super()._compute_loss(model, inputs, return_outputs)
        loss = self.loss_of_batch(model, inputs)
        if not return_outputs:
            return loss
        warnings.warn("The logits for compute_metrics take a forward pass more; TRL 2.0 removes them.", stacklevel=2)
        kwargs = self.model_inputs(inputs) | {"labels": None, "fused_lm_head": False}
        with torch.no_grad():
            return loss, model(**kwargs)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        def tokenized(rows, lists=False):
            if lists:
                return prepare_lists(rows, processing_class, self._tokenizer, args, dataset_name)
            return super(DPOHooks, self)._prepare_dataset(rows, processing_class, args, dataset_name)

        return self.prepared_rows(dataset, dataset_name, tokenized)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        missing = [name for name in self.extra_columns if name not in self._signature_columns]
        self._signature_columns = [*self._signature_columns, *missing]

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None:
            # ZeRO-3 collects all parameters of a model, also those that its modules keep out of their state.
            state_dict = {name: value for name, value in state_dict.items() if MASK_NETWORK not in name.split(".")}
        super()._save(output_dir, state_dict=state_dict)

    @property
    def text_tokenizer(self):
        return self._tokenizer
