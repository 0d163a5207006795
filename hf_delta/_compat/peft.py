"""Private names of PEFT: new members of its enum of methods, and hooks with plain names over its tuner classes.

PEFT has a public function that registers a method, but it accepts only names that its `PeftType` enum already has.
`tests/test_seams.py` compares the recorded signatures with the installed PEFT.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from packaging.specifiers import SpecifierSet
from torch import nn

from hf_delta._compat.versions import require_supported


SUPPORTED_PEFT = SpecifierSet(">=0.21,<0.22")


def require_supported_peft(installed: str | None = None) -> None:
    """
    Raises:
        `ImportError`: the installed PEFT is outside the tested range.
    """
    require_supported("peft", "PEFT", SUPPORTED_PEFT, installed)


require_supported_peft()

# After the version check, which has the better message.
from peft import PeftConfig, PeftType  # noqa: E402
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402
from peft.tuners._buffer_dict import BufferDict  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features, check_adapters_to_merge  # noqa: E402
from peft.utils import register_peft_method  # noqa: E402
from peft.utils.other import AuxiliaryTrainingWrapper  # noqa: E402


__all__ = [
    "BufferDict",
    "SavedBuffers",
    "TunerHooks",
    "TunerLayerHooks",
    "in_out_features",
    "peft_type",
    "register_method",
    "require_supported_peft",
]

# Parameters of each private method that is overridden or called, as of PEFT 0.21.
TUNER_SEAMS: dict[str, tuple[str, ...]] = {
    "_create_and_replace": (
        "self",
        "peft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "parameter_name",
    ),
    "_replace_module": ("self", "parent", "child_name", "new_module", "child"),
    "_remap_adapter_state_dict_for_load": ("model", "config", "adapter_name", "state_dict"),
}
LAYER_SEAMS: dict[str, tuple[str, ...]] = {
    "_move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
}
# Read by `PeftModel` on its tuner where it exists, and attributes of every tuner layer.
ATTRIBUTES: tuple[str, ...] = ("_enable_peft_forward_hooks", "_active_adapter", "_disable_adapters")


def peft_type(name: str) -> PeftType:
    """The member of PEFT's enum of methods with this name, in capitals; added if it is not there.

    A member and not a plain string, because transformers reads `config.peft_type.value`.
    """
    name = name.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    # From Python 3.12 on, members are attributes of the class.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register_method(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make a method known to `get_peft_model`, `PeftModel`, `AutoPeftModel...` and transformers; twice does nothing.

    Raises:
        `KeyError`: another class has this name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(name))
    if known is None:
        register_peft_method(name=name, config_cls=config, model_cls=model)
    elif known is not config:
        raise KeyError(f"PEFT already has a method {name!r}: {known.__module__}.{known.__qualname__}")


class SavedBuffers(BufferDict):
    """The buffers of adapters that are saved with them, and that keep their values where Accelerate loads a sharded model.

    For `fsdp_cpu_ram_efficient_loading` it sends a model with its buffers to the meta device, shards it there, and takes
    every entry of its state for a parameter that was sharded. Values are put aside on the way, and are no part of the
    state until they are back; collective, because they come from the first process, as those of parameters do: up to
    version 5.17 at least, transformers loads zeros in the others, from which nothing can be derived.
    """

    def __init__(self):
        super().__init__(persistent=True)
        self.aside: dict[str, torch.Tensor] = {}

    def _apply(self, fn, *args, **kwargs):
        before = dict(self.items())
        super()._apply(fn, *args, **kwargs)
        self.aside |= {name: value for name, value in before.items() if self[name].is_meta and not value.is_meta}
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.aside:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs):
        for name, value in self.aside.items():
            if prefix + name not in state_dict:
                # NCCL takes no other layout, and what comes out of a factorisation may be transposed.
                state_dict[prefix + name] = broadcast(value.to(PartialState().device).contiguous())
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
        self.aside = {name: value for name, value in self.aside.items() if self[name].is_meta}


class TunerHooks(BaseTuner):
    """`BaseTuner` whose seams call methods with plain names.

    Hooks:
        `adapt(config, adapter_name, module, key)`: the module that takes the place of `module`, or `module` itself.
        `mixed_batch(adapter_names, beams)`: context in which each row of a batch has an adapter of its own.
        `check_state(model, adapter_name, state)`: before saved tensors are put into an adapter.
    """

    def adapt(self, config: PeftConfig, adapter_name: str, module: nn.Module, key: str) -> nn.Module:
        raise TypeError(f"{type(self).__name__} does not say how it adapts a module")

    @contextmanager
    def mixed_batch(self, adapter_names: list[str], beams: int) -> Iterator[None]:
        raise ValueError(f"{type(self).__name__} takes no adapter_names; call set_adapter before each batch.")
        yield

    @classmethod
    def check_state(cls, model: nn.Module, adapter_name: str, state: dict[str, torch.Tensor]) -> None:
        pass

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **unused):
        adapted = self.adapt(peft_config, adapter_name, target, current_key)
        if adapted is target:
            return
        if adapter_name not in self.active_adapters:
            adapted.requires_grad_(False)
        self._replace_module(parent, target_name, adapted, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names: list[str] | None = None, **kwargs):
        if adapter_names is None:
            yield
            return
        names = list(adapter_names)
        # `generate` repeats rows for whichever of the two is more.
        beams = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        # Modules that are trained whole have a copy for each adapter, and take the names with their input.
        wholes = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        hook = partial(_pass_adapter_names, names=names)
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in wholes]
        try:
            with self.mixed_batch(names, beams):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        cls.check_state(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _pass_adapter_names(module: nn.Module, args: tuple, kwargs: dict, names: list[str]) -> tuple[tuple, dict]:
    # One name for each row; beam search repeats the rows.
    repeats = max(len(args[0]) // len(names), 1) if args else 1
    return args, {**kwargs, "adapter_names": [name for name in names for _ in range(repeats)]}


class TunerLayerHooks(BaseTunerLayer):
    """`BaseTunerLayer` with plain names for what a layer needs of it."""

    # Set by `peft.helpers.disable_input_dtype_casting`; our layers never cast an input, so that nothing reads it.
    cast_input_dtype_enabled = True

    def start_unmerged(self, adapter_name: str) -> None:
        """The state of a layer that was just made: one active adapter, nothing merged, nothing disabled."""
        self._active_adapter = adapter_name
        self._disable_adapters = False
        self.merged_adapters = []

    def move_adapter(self, adapter_name: str) -> None:
        """Bring a new adapter's tensors to the device, and its floating point ones to the dtype, of the base layer."""
        super()._move_adapter_to_device_of_base_layer(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT calls this on adapters that it has loaded; cast to a 16-bit base, they would lose half of what was saved.
        device = device or self.get_base_layer().weight.device
        for name in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, name)
            if isinstance(held, (nn.ModuleDict, BufferDict)) and adapter_name in held:
                tensors = (
                    [*held[adapter_name].parameters()] if isinstance(held, nn.ModuleDict) else [held[adapter_name]]
                )
                if not any(tensor.is_meta for tensor in tensors):
                    held[adapter_name] = held[adapter_name].to(device)

    def not_yet_merged(self, adapter_names: list[str] | None) -> list[str]:
        """The adapters out of `adapter_names`, or of the active ones, that are still to be merged; warns of the rest."""
        return check_adapters_to_merge(self, adapter_names)


def in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """Input and output size of a linear layer of any kind that PEFT knows, also while its weight is sharded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        sizes: Any = _get_in_out_features(module)
    return sizes
