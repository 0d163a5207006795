"""Merging of one PEFT layer that leaves its base weights alone, through private names of torch and PEFT."""

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


# Attributes in which torch keeps what a module consists of.
_REGISTRIES = ("_parameters", "_buffers", "_modules")


class CopiedMerge:
    """One tuner layer, merged into copies of its base parameters, and the way back.

    PEFT's `merge` writes to the base weight, and its `unmerge` computes the weight again, which does not come back to the
    same bits. Here the parameter objects are exchanged for copies before, and put back after; `unmerge` is only called
    where the layer exchanged modules or parameters by itself.

    Args:
        layer: the tuner layer, with nothing merged.
        copies: whether parameters are exchanged for copies; not needed where `merge` never writes to one.
    """

    def __init__(self, layer: BaseTunerLayer, copies: bool = True):
        self.layer = layer
        self.exchanges = not copies
        self._base = layer.base_layer
        self._registered = [(module, dict(module._parameters)) for module in base_parameters(layer)]
        self._attributes: dict[str, Any] = {}
        self._installed: list[tuple[nn.Module, str, nn.Parameter]] = []
        if copies:
            self._install_copies()

    def merge(self, adapter_names: list[str] | None = None) -> None:
        """Merge, with whatever `merge` of the layer raises; [`undo`] is due in any case."""
        before = {name: (value, _content(value)) for name, value in self._plain_attributes().items()}
        try:
            with torch.no_grad():
                self.layer.merge(adapter_names=adapter_names)
        finally:
            now = self._plain_attributes()
            self._attributes = {
                name: before.get(name)
                for name in {**before, **now}
                if name not in now or name not in before or not _is_still(now[name], *before[name])
            }
            exchanged = any(module._parameters[name] is not copy for module, name, copy in self._installed)
            self.exchanges = self.exchanges or exchanged or self.layer.base_layer is not self._base

    def undo(self) -> None:
        """Put back the very objects: parameters of the base layer, and what `merge` noted in the layer."""
        if self.exchanges and self.layer.merged:
            self.layer.unmerge()
        elif not self.exchanges:
            for name, found in self._attributes.items():
                self._restore(name, found)
        for module, parameters in self._registered:
            module._parameters.clear()
            module._parameters.update(parameters)

    @property
    def original_weight(self) -> nn.Parameter | None:
        """The weight of the base layer as it was before."""
        return self._registered[0][1].get("weight")

    def _install_copies(self) -> None:
        for module, names in base_parameters(self.layer).items():
            for name in names:
                # Without a gradient: one that is computed here would be lost without a word.
                copy = nn.Parameter(module._parameters[name].detach().clone(), requires_grad=False)
                module._parameters[name] = copy
                self._installed.append((module, name, copy))

    def _plain_attributes(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.layer).items() if name not in _REGISTRIES}

    def _restore(self, name: str, found: tuple[Any, Any] | None) -> None:
        if found is None:
            vars(self.layer).pop(name, None)
            return
        value, content = found
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, dict):
            value.clear()
            value.update(content)
        vars(self.layer)[name] = value


def _content(value: Any) -> Any:
    return value.copy() if isinstance(value, (list, dict)) else None


def _is_still(now: Any, value: Any, content: Any) -> bool:
    if now is not value:
        return False
    if isinstance(value, list):
        return len(value) == len(content) and all(a is b for a, b in zip(value, content))
    if isinstance(value, dict):
        return value.keys() == content.keys() and all(value[key] is content[key] for key in content)
    return True


def base_parameters(layer: BaseTunerLayer) -> dict[nn.Module, list[str]]:
    """The modules below a tuner layer, the one that it adapts first, and the names of their parameters that it may change."""
    base = layer.get_base_layer()
    if (name := getattr(layer, "parameter_name", None)) is not None:
        # A layer over one parameter of a module, such as all experts in one tensor.
        return {base: [name]}
    return {
        module: [name for name, parameter in module._parameters.items() if parameter is not None]
        for module in base.modules()
    }


def is_flattened(parameter: torch.Tensor) -> bool:
    """Whether a parameter is a view into a flat parameter of FSDP 1."""
    return bool(getattr(parameter, "_fsdp_flattened", False) or getattr(parameter, "_is_flat_param", False))


def refuse_unmergeable(tuner: BaseTuner) -> None:
    """
    Raises:
        `ValueError`: PEFT says of this model as a whole that it cannot be merged.
    """
    with warnings.catch_warnings():
        # PEFT warns of tied weights here, which do not change with copies.
        warnings.simplefilter("ignore")
        tuner._check_merge_allowed()
