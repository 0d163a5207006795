"""How the same adapter is written down by PEFT's Bone (0.14 to 0.18), by PEFT's MiSS and here.

The tensors are the same; fields and names differ.
"""

from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, MissConfig, PeftType

from hf_delta.adapters.bone.config import BoneConfig
from hf_delta.errors import InputError


OLD_BONE, MISS, OURS = "BONE", "MISS", "HFD_BONE"

# How names of blocks end in a saved file.
BLOCK_NAMES = {OLD_BONE: ".bone_block", MISS: ".miss_block", OURS: ".hfd_bone_block.weight"}

SHARED_FIELDS = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
# Written by PEFT about the file, not about the adapter.
ABOUT_THE_FILE = ("peft_type", "peft_version", "auto_mapping")

_MODES = {True: "bone", False: "bone", "bat": "bat_col", "mini": "mini"}
_INIT_WEIGHTS = {"bone": True, "bat_col": "bat", "mini": "mini"}


def bone_config(fields: dict[str, Any]) -> BoneConfig:
    """Our configuration for the fields of an `adapter_config.json` of PEFT's Bone or MiSS.

    Raises:
        `InputError`: a field that decides what the tensors mean has an unknown value.
    """
    init_weights = fields.get("init_weights", True)
    if not isinstance(init_weights, (bool, str)) or init_weights not in _MODES:
        raise InputError(
            f"init_weights is {init_weights!r}, which no Bone or MiSS of PEFT up to 0.21 has: it should be true, false, "
            "'bat' or 'mini'."
        )
    mode, bias = _MODES[init_weights], fields.get("bias", "none")
    kept = {name: fields[name] for name in SHARED_FIELDS if name in fields}
    kept["bias"] = "hfd_bone_only" if str(bias).lower() in ("bone_only", "miss_only") else bias
    return BoneConfig(
        **kept,
        mode=mode,
        mini_r=fields.get("mini_r", 1) if mode == "mini" else None,
        dropout=fields.get("miss_dropout", 0.0),
    )


def miss_config(config: BoneConfig) -> MissConfig:
    """PEFT's configuration for the same adapter.

    Raises:
        `InputError`: PEFT has no such mode.
    """
    if config.mode not in _INIT_WEIGHTS:
        raise InputError(
            f"mode: {config.mode} has no form in PEFT's MiSS, which has {', '.join(_INIT_WEIGHTS)}. Export the adapter "
            "with hf-delta export instead: --format lora is exact for mode row, --format merged for every mode."
        )
    return MissConfig(
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        init_weights=_INIT_WEIGHTS[config.mode],
        mini_r=config.mini_r or 1,
        miss_dropout=config.dropout,
        bias="MiSS_only" if config.bias == "hfd_bone_only" else config.bias,
    )


def rename_blocks(tensors: dict[str, torch.Tensor], source: str, target: str) -> dict[str, torch.Tensor]:
    """The same tensors with the names of another format; other tensors keep theirs."""
    old, new = BLOCK_NAMES[source], BLOCK_NAMES[target]
    return {name.removesuffix(old) + new if name.endswith(old) else name: value for name, value in tensors.items()}


class OldBoneConfig(BoneConfig):
    """What PEFT finds for `peft_type: BONE`: makes a [`BoneConfig`] out of the fields of PEFT's old `BoneConfig`.

    The result carries `old_names = True`, so that a layer knows that its values come under other names.
    """

    def __new__(cls, **fields: Any) -> BoneConfig:
        config = bone_config(fields)
        config.old_names = True
        return config


def register_old_bone() -> None:
    """Let PEFT load directories of its own former Bone, as our Bone.

    Only where PEFT has nothing of that name: its enum of methods is asked, which lists what PEFT itself has.
    """
    if OLD_BONE not in PeftType.__members__:
        PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(OLD_BONE, OldBoneConfig)
