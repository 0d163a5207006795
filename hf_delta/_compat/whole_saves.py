"""Private names of transformers: adapters and models are saved whole, also where checkpoints are sharded, and heads trained."""

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from peft import PeftModel, get_peft_model_state_dict
from transformers import Trainer

from hf_delta._compat.fsdp import check_trained_whole, unshard_trained_head
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_tensor


# Parameters of each private method that is overridden or called, as of transformers 5.17 to 5.23.
SEAMS: dict[str, tuple[str, ...]] = {
    "_save": ("self", "output_dir", "state_dict"),
    "_save_checkpoint": ("self", "model", "trial"),
}


class WholeSaves(Trainer):
    """Mixin that stands before the trainer among the bases, for FSDP with `SHARDED_STATE_DICT`.

    transformers' `save_model` writes nothing there, and checkpoints hold shards that only a sharded run of the same kind can
    read. With this, an adapter is gathered into every checkpoint and by `save_model`; a model without one by `save_model`
    alone. Whatever is saved otherwise is what transformers saves. With either kind of state dict a head that is trained beside
    an adapter gets the gradient of all processes, see [`unshard_trained_head`].
    """

    in_checkpoint = False

    def create_accelerator_and_postprocess(self) -> None:
        """
        Raises:
            `InputError`: of this run nothing could be loaded: FSDP of version 1, an adapter under FSDP's own activation
                checkpointing, or ZeRO-3 that may not gather a model; or FSDP could not shard it, see [`check_trained_whole`].
        """
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise InputError(
                "FSDP version 1: adapters read weights that it takes apart, and it is deprecated. Write fsdp_version: 2 in the "
                "configuration of accelerate, or version: 2 in fsdp_config."
            )
        if self.is_fsdp_enabled and is_peft_model(self.model):
            check_trained_whole(self.model)
            unshard_trained_head(self.model)
            if self.accelerator.state.fsdp_plugin.activation_checkpointing:
                # It renames modules, by whose names PEFT looks for what is to be saved, and finds nothing.
                raise InputError(
                    "Activation checkpointing by FSDP: PEFT would save an adapter without a single tensor. Write "
                    "fsdp_activation_checkpointing: false in the configuration of accelerate, and gradient_checkpointing: true "
                    "in the recipe."
                )
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            zero = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
            if not is_peft_model(self.model) and not zero.get("stage3_gather_16bit_weights_on_model_save"):
                raise InputError(
                    "ZeRO-3 would save shards instead of a model. Write zero3_save_16bit_model: true in the configuration of "
                    "accelerate, or stage3_gather_16bit_weights_on_model_save: true in that of DeepSpeed."
                )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]. Collective."""
        if self.is_fsdp_enabled and "SHARDED" in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            # Before super(), which writes nothing and may push what is there to the Hub.
            if is_peft_model(self.model):
                self._save_whole(output_dir, adapter_state_dict(self.model, keep=self.args.should_save))
            elif not self.in_checkpoint:
                self._save_whole(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save_whole(self, output_dir: str | None, state_dict: dict[str, torch.Tensor]) -> None:
        # Up to version 5.17 at least, transformers asks before it calls `_save`, which does not ask again.
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)

    def _save_checkpoint(self, model, trial) -> None:
        self.in_checkpoint = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.in_checkpoint = False


def adapter_state_dict(model: PeftModel, keep: bool = True) -> dict[str, torch.Tensor]:
    """What PEFT saves of all adapters of a model, on the CPU and under the model's names. Collective.

    Base weights are gathered only if PEFT saves them, and one tensor at a time.

    Args:
        model (`PeftModel`): Sharded or not.
        keep (`bool`, *optional*, defaults to `True`): Whether this process wants the tensors, and not only helps to gather them.
    """
    shards = model.state_dict()
    saved = [get_peft_model_state_dict(model, state_dict=shards, adapter_name=name) for name in model.peft_config]
    wanted = {id(value) for state in saved for value in state.values()}
    known = {id(value) for value in shards.values()}
    if not wanted <= known:
        # A method that computes what it saves (AdaLoRA prunes ranks) does so again from whole tensors.
        wanted = known
    # Of the first process, which writes: PEFT may ask the Hub whether embeddings were resized, and not all may get an answer.
    (names,) = broadcast_object_list([[name for name, value in shards.items() if id(value) in wanted]])
    found = {}
    for name in names:
        value = shards[name]
        whole = full_tensor(value) if isinstance(value, torch.Tensor) else value
        if keep:
            found[name] = whole.cpu() if isinstance(whole, torch.Tensor) else whole
    return found
