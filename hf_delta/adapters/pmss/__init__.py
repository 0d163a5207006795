"""PMSS: a trained core between selected columns and rows of the weight."""

from hf_delta.adapters.pmss.config import PmssConfig
from hf_delta.adapters.pmss.layer import PmssLinear
from hf_delta.adapters.pmss.model import PmssModel


__all__ = ["PmssConfig", "PmssLinear", "PmssModel"]
