"""Dense values of weights that were quantised with bitsandbytes while the adapter was trained."""

import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from hf_delta.errors import InputError


@dataclass(frozen=True)
class Quantization:
    """How the base model was loaded for training; the names are those of TRL's `ModelConfig`.

    Attributes:
        load_in_4bit (`bool`): 4 bits, in the format `bnb_4bit_quant_type`.
        load_in_8bit (`bool`): 8 bits, "LLM.int8()".
        bnb_4bit_quant_type (`str`): `"nf4"` or `"fp4"`.
        use_bnb_nested_quant (`bool`): Whether the scales are quantised too.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("a base model is loaded in 4 bits or in 8 bits, not both.")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InputError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}: write nf4 or fp4.")

    def __bool__(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """The values that the quantised weight `(o, i)` stands for, in the dtype of its computation."""
        functional = _bitsandbytes().functional
        if self.load_in_8bit:
            codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
            return functional.int8_vectorwise_dequant(codes, scales)
        codes, state = functional.quantize_4bit(
            weight.contiguous(), quant_type=self.bnb_4bit_quant_type, compress_statistics=self.use_bnb_nested_quant
        )
        return functional.dequantize_4bit(codes, state)

    def quantised_modules(self, model: PreTrainedModel) -> set[str]:
        """The layers of a model that transformers would quantise; the model is changed."""
        _bitsandbytes()
        config = BitsAndBytesConfig(load_in_4bit=self.load_in_4bit, load_in_8bit=self.load_in_8bit)
        AutoHfQuantizer.from_config(config, pre_quantized=False).preprocess_model(model=model, device_map=None)
        kinds = ("Linear4bit", "Linear8bitLt")
        return {name for name, module in model.named_modules() if type(module).__name__ in kinds}


def recorded_quantization(adapter: Path) -> dict[str, Any]:
    """What `run.json` beside an adapter, or above a checkpoint, says about how the base model was loaded."""
    for folder in (adapter, adapter.parent) if adapter.name.startswith("checkpoint-") else (adapter,):
        try:
            values = json.loads((folder / "run.json").read_text(encoding="utf-8"))["values"]
            return {name: values[name] for name in Quantization.__dataclass_fields__ if values.get(name) is not None}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def check_stored_quantization(config: dict[str, Any], asked: Quantization | None) -> bool:
    """Whether a checkpoint with this `config.json` holds weights quantised with bitsandbytes.

    Raises:
        `InputError`: it holds them in another format, or they are to be quantised once more.
    """
    stored = config.get("quantization_config")
    if not stored:
        return False
    method = stored.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise InputError(
            f"the base model is quantised with {method}, which is not read here: give the model that it was made from as the "
            "base."
        )
    if asked:
        raise InputError("the base model is stored quantised: leave out that it is to be loaded in 4 or 8 bits.")
    _bitsandbytes()
    return True


def parts_of_quantised(keys: Iterable[str]) -> dict[str, list[str]]:
    """For each quantised weight of a checkpoint the names of the scales and tables that belong to it."""
    keys = set(keys)
    parts = defaultdict(list)
    for key in keys:
        # Int8 has them beside the weight, 4 bits below its name.
        aside = key.endswith((".SCB", ".weight_format"))
        owner = f"{key.rpartition('.')[0]}.weight" if aside else f"{key.rpartition('.weight.')[0]}.weight"
        if owner in keys and owner != key:
            parts[owner].append(key)
    return dict(parts)


def dequantised(key: str, stored: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The dense weight of stored codes; `parts` are the tensors that belong to it, by their whole names."""
    functional = _bitsandbytes().functional
    module = key.removesuffix(".weight")
    if f"{module}.SCB" in parts:
        return functional.int8_vectorwise_dequant(stored, parts[f"{module}.SCB"])
    own = {name.removeprefix(f"{key}."): tensor for name, tensor in parts.items()}
    state = functional.QuantState.from_dict(own, device=stored.device)
    return functional.dequantize_4bit(stored, state)


def _bitsandbytes() -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("the base model is quantised: pip install bitsandbytes.")
    import bitsandbytes

    return bitsandbytes
