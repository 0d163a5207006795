"""Adapters that PEFT does not have. A method is one folder and one line in `ADAPTERS`.

Importing this module makes them known to PEFT, so that every way of PEFT, TRL and transformers to make, save and load an
adapter takes them.
"""

from hf_delta._compat.peft import register_method
from hf_delta.adapters.bone import BoneConfig, BoneModel, register_old_bone
from hf_delta.adapters.edora import EdoraConfig, EdoraModel
from hf_delta.adapters.pmss import PmssConfig, PmssModel


# What a recipe calls `method`, and its classes. PEFT's name of a method is this one with "hfd_" before it.
ADAPTERS = {
    "bone": (BoneConfig, BoneModel),
    "edora": (EdoraConfig, EdoraModel),
    "pmss": (PmssConfig, PmssModel),
}

for _name, (_config, _model) in ADAPTERS.items():
    register_method(f"hfd_{_name}", _config, _model)
register_old_bone()
