"""Merging of one PEFT layer that leaves its base weights alone, through private names of torch and PEFT."""

import operator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


# Attributes of a tuner layer that are not looked after: what it consists of is put back in other ways.
_REGISTRIES = ("_parameters", "_modules")
# Attributes of the modules inside of it in which a merge may leave something.
_NOTES = ("_buffers", "_non_persistent_buffers_set")


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
        self.copies, self.exchanges = copies, not copies
        self._base = layer.base_layer
        self._registered = [(module, dict(module._parameters)) for module in base_parameters(layer)]
        self._changed: list[_Attribute] = []
        self._installed: list[tuple[nn.Module, str, nn.Parameter]] = []

    def merge(self) -> None:
        """Merge, with whatever `merge` of the layer raises; [`undo`] is due in any case."""
        if self.copies:
            self._install_copies()
        before = self._attributes()
        try:
            with torch.no_grad():
                self.layer.merge()
        finally:
            self._changed = [attribute for attribute in before if not attribute.is_still()]
            exchanged = any(module._parameters[name] is not copy for module, name, copy in self._installed)
            self.exchanges = self.exchanges or exchanged or self.layer.base_layer is not self._base
            # A layer that put something else in the place of a copy has no use for the copy.
            self._installed.clear()

    def undo(self) -> None:
        """Put back the very objects: parameters of the base layer, and what `merge` noted in the layer."""
        if not self.exchanges:
            for attribute in self._changed:
                attribute.restore()
        elif self.layer.merged:
            self.layer.unmerge()
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

    def _attributes(self) -> list["_Attribute"]:
        base = set(self._base.modules())
        notes = [(module, name) for module in self.layer.modules() if module not in base for name in _NOTES]
        plain = [(self.layer, name) for name in vars(self.layer) if name not in (*_REGISTRIES, *_NOTES)]
        return [_Attribute(owner, name) for owner, name in notes + plain]


class _Attribute:
    """An attribute of a module as it was, with what it held if it is a container."""

    def __init__(self, owner: nn.Module, name: str):
        self.owner, self.name = owner, name
        self.value = vars(owner)[name]
        self.content = self.value.copy() if isinstance(self.value, (list, dict, set)) else None

    def is_still(self) -> bool:
        value, content = vars(self.owner).get(self.name), self.content
        if value is not self.value:
            return False
        if isinstance(value, list):
            return len(value) == len(content) and all(map(operator.is_, value, content))
        if isinstance(value, dict):
            return value.keys() == content.keys() and all(value[key] is content[key] for key in content)
        return content is None or value == content

    def restore(self) -> None:
        if isinstance(self.value, list):
            self.value[:] = self.content
        elif self.content is not None:
            self.value.clear()
            self.value.update(self.content)
        vars(self.owner)[self.name] = self.value


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
