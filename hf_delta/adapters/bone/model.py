"""The tuner of Bone."""

import torch
from torch import nn

from hf_delta.adapters.base import DeltaModel
from hf_delta.adapters.bone.formats import BLOCK_NAMES, OLD_BONE, OURS, rename_blocks
from hf_delta.adapters.bone.layer import BoneLinear


class BoneModel(DeltaModel):
    """Puts [`BoneLinear`] layers into a model."""

    prefix = "hfd_bone_"
    tuner_layer_cls = BoneLinear

    @classmethod
    def check_state(cls, model: nn.Module, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
        super().check_state(model, adapter_name, state)
        if not any(name.endswith(BLOCK_NAMES[OLD_BONE]) for name in state):
            return
        renamed = rename_blocks(state, OLD_BONE, OURS)
        state.clear()
        state.update(renamed)
        # A copy of this adapter, such as a reference adapter, is made from the same configuration.
        model.peft_config[adapter_name].old_names = False
        for module in model.modules():
            if isinstance(module, BoneLinear):
                module.old_names.discard(adapter_name)
