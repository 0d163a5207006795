"""The way out of an adapter: as a plain LoRA that vLLM takes, or merged into a copy of its base model."""

from hf_delta.adapters.export.files import check_new
from hf_delta.adapters.export.lora import export_lora, to_lora
from hf_delta.adapters.export.merged import export_merged
from hf_delta.adapters.export.quantised import Quantization, recorded_quantization
from hf_delta.adapters.export.result import LoraExport, ModuleError


__all__ = [
    "LoraExport",
    "ModuleError",
    "Quantization",
    "check_new",
    "export_lora",
    "export_merged",
    "recorded_quantization",
    "to_lora",
]
