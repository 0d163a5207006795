"""The tuner of PMSS."""

from hf_delta.adapters.base import DeltaModel
from hf_delta.adapters.pmss.layer import PmssLinear


class PmssModel(DeltaModel):
    """The tuner of [`PmssConfig`]."""

    prefix = "hfd_pmss_"
    tuner_layer_cls = PmssLinear
