"""What every adapter of hf_delta shares: the fields, the wrapped linear layer with its whole PEFT life, the tuner."""

from hf_delta.adapters.base.config import DeltaAdapterConfig
from hf_delta.adapters.base.layer import AdapterWeight, DeltaLinear
from hf_delta.adapters.base.model import DeltaModel


__all__ = ["AdapterWeight", "DeltaAdapterConfig", "DeltaLinear", "DeltaModel"]
