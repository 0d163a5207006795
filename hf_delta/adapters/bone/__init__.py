"""Bone: block affine adaptation, with PEFT's MiSS and its former Bone as special cases."""

from hf_delta.adapters.bone.config import BoneConfig
from hf_delta.adapters.bone.convert import convert_to_bone, convert_to_miss
from hf_delta.adapters.bone.formats import register_old_bone
from hf_delta.adapters.bone.layer import BoneLinear
from hf_delta.adapters.bone.model import BoneModel


__all__ = ["BoneConfig", "BoneLinear", "BoneModel", "convert_to_bone", "convert_to_miss", "register_old_bone"]
