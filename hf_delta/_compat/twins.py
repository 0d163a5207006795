"""Copies of modules that share everything but their parameters, through private names of torch and PEFT."""

import importlib
from collections.abc import Callable, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


_FRESH = vars(nn.Module())
_HOOKS = tuple(name for name in _FRESH if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")))
_REGISTRIES = ("_parameters", "_buffers", "_modules")


def twin(
    module: nn.Module,
    parameter: Callable[[nn.Parameter], nn.Parameter],
    instead: Mapping[nn.Module, nn.Module] | None = None,
) -> nn.Module:
    """A module of the same classes with other parameters, to be changed while the original stays as it is.

    Plain containers are copied one level deep; buffers and all other values are shared, so that whoever works on the twin
    may put others in their place and must not write to them. Hooks, and a `forward` put on an object, belong to the
    original: FSDP's for one would shard and gather it.

    Args:
        module: the original.
        parameter: gives the twin's parameter for one of the original; called once for each.
        instead: modules below, and what the twin has in their places.
    """
    return _Twins(parameter, instead or {}).of(module)


class _Twins:
    # No function inside of a function that calls itself: such a pair keeps what it sees until the garbage is collected.
    def __init__(self, parameter: Callable[[nn.Parameter], nn.Parameter], instead: Mapping[nn.Module, nn.Module]):
        self.parameter = parameter
        self.modules: dict[int, nn.Module] = {id(old): new for old, new in instead.items()}
        self.parameters: dict[int, nn.Parameter] = {}

    def of(self, old: nn.Module | None) -> nn.Module | None:
        if old is None or id(old) in self.modules:
            return self.modules.get(id(old))
        new = self.modules[id(old)] = object.__new__(type(old))
        state = vars(new)
        for name, value in vars(old).items():
            if name not in (*_REGISTRIES, "forward"):
                state[name] = value.copy() if isinstance(value, (dict, list, set)) else value
        state |= {name: _FRESH[name].copy() for name in _HOOKS}
        # DeepSpeed has a dictionary of its own in the place of this one, which gathers what is taken out of it.
        state["_parameters"] = {name: self.parameter_of(value) for name, value in old._parameters.items()}
        state["_buffers"] = dict(old._buffers)
        state["_modules"] = {name: self.of(value) for name, value in old._modules.items()}
        return new

    def parameter_of(self, old: nn.Parameter | None) -> nn.Parameter | None:
        if old is not None and id(old) not in self.parameters:
            self.parameters[id(old)] = self.parameter(old)
        return None if old is None else self.parameters[id(old)]


def make_dense(layer: BaseTunerLayer) -> None:
    """Turn a tuner layer whose quantised base layer was exchanged for a dense one into one that merges into dense weights.

    PEFT has classes of their own for some methods over bitsandbytes, and in others an object that quantises again.

    Raises:
        `TypeError`: PEFT has no class for dense layers beside the one for quantised ones.
    """
    if hasattr(layer, "quantization_backend"):
        layer.quantization_backend = None
    package, _, file = type(layer).__module__.rpartition(".")
    if file != "bnb":
        return
    name = type(layer).__name__.removesuffix("4bit").removesuffix("8bitLt")
    dense = getattr(importlib.import_module(f"{package}.layer"), name, None)
    if dense is None:
        raise TypeError(f"{package} has no {name} for dense layers")
    layer.__class__ = dense
    # Quantised layers are never transposed; PEFT's other classes take these two from their constructors.
    vars(layer).setdefault("fan_in_fan_out", False)
    vars(layer).setdefault("is_target_conv_1d_layer", False)
