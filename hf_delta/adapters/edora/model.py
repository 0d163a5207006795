"""The tuner that puts EDoRA layers into a model."""

from hf_delta.adapters.base import DeltaModel
from hf_delta.adapters.edora.layer import EdoraLinear


class EdoraModel(DeltaModel):
    """EDoRA in a model; made by `get_peft_model(model, EdoraConfig(...))`."""

    prefix = "hfd_edora_"
    tuner_layer_cls = EdoraLinear
