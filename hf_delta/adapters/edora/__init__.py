"""EDoRA: frozen singular vectors, a trained core and magnitude; LoRA-XS without the magnitude."""

from hf_delta.adapters.edora.config import EdoraConfig
from hf_delta.adapters.edora.layer import EdoraLinear
from hf_delta.adapters.edora.model import EdoraModel


__all__ = ["EdoraConfig", "EdoraLinear", "EdoraModel"]
