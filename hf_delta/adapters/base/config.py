"""The fields that all adapters of hf_delta have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig

from hf_delta._compat.peft import peft_type
from hf_delta.errors import InputError


@dataclass
class DeltaAdapterConfig(PeftConfig):
    """Base of the adapter configurations; the fields mean what they mean in `LoraConfig`.

    Parameters:
        r (`int`, *optional*, defaults to `16`):
            Size of the adapter; each method says what it counts.
        target_modules (`list[str]` or `str`, *optional*):
            Linear layers to adapt: names or ends of names, a regular expression, or `"all-linear"`. By default those
            that PEFT takes for LoRA on this architecture.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers to leave out, in the same forms.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Indices of the blocks to adapt; all by default.
        layers_pattern (`list[str]` or `str`, *optional*):
            Name of the list of blocks, where it is not one of the usual names.
        modules_to_save (`list[str]`, *optional*):
            Other modules that are trained whole and saved with the adapter.
        bias (`str`, *optional*, defaults to `"none"`):
            Which biases of the model are trained: `"none"`, `"all"`, or those of adapted layers, `"hfd_<method>_only"`.

    Raises:
        `InputError`: a value that cannot be used, with what to write instead.
    """

    method: ClassVar[str]
    paper: ClassVar[tuple[str, str] | None]  # title and number on arXiv, for the model card

    r: int = field(default=16, metadata={"help": "Size of the adapter."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Linear layers to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that are trained whole."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or hfd_<method>_only."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(f"hfd_{self.method}")
        self.target_modules = _as_set(self.target_modules)
        self.exclude_modules = _as_set(self.exclude_modules)
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise InputError(f"r is {self.r!r}: write a whole number from 1 up.")
        if self.bias not in (biases := ("none", "all", f"hfd_{self.method}_only")):
            raise InputError(f"bias is {self.bias!r}: write one of {', '.join(biases)}.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise InputError(
                    f"{name} goes with a list of target_modules, and target_modules is {self.target_modules!r}: name the "
                    f"modules as a list, or leave {name} out."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise InputError("layers_pattern says where layers_to_transform counts: write layers_to_transform too.")

    @classmethod
    def paper_of(cls, values: Mapping[str, Any]) -> tuple[str, str] | None:
        """The paper of an adapter with these fields, where variants of a method have papers of their own."""
        return cls.paper

    def check_fraction(self, name: str) -> None:
        """
        Raises:
            `InputError`: the field is not a probability below 1.
        """
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise InputError(f"{name} is {value!r}: write a number from 0 up to, but not including, 1.")

    def check_choice(self, name: str, choices) -> None:
        """
        Raises:
            `InputError`: the field is none of the choices.
        """
        if getattr(self, name) not in choices:
            raise InputError(f"{name} is {getattr(self, name)!r}: write one of {', '.join(choices)}.")


def _as_set(names):
    return set(names) if isinstance(names, (list, tuple)) else names
