"""Exchange of a base weight for a merged one, and back."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_delta._compat.bitsandbytes import dequantised_weight
from hf_delta.ops.gather import frozen_parameter, full_tensor


class MergedWeight:
    """The original weight of a base layer while another one stands in its place.

    Parameter objects are exchanged, and the module itself where it is quantised, because arithmetic does not come back
    to the same bits and assignment to `.data` is ignored on sharded parameters. A sharded weight belongs to FSDP, which
    knows the object; its shard is copied aside and written in place.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.weight: torch.Tensor = layer.weight
        self.shard: torch.Tensor | None = None

    def original(self, backend) -> torch.Tensor:
        """The original weight in the layout of the layer, dequantised and whole; collective where it is sharded."""
        if backend is not None:
            with torch.no_grad():
                return dequantised_weight(self.layer, backend).detach()
        if self.shard is None:
            return full_tensor(self.weight)
        weight = self.weight
        whole = DTensor.from_local(
            self.shard, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
        )
        return full_tensor(whole)

    def install(self, tuner_layer: BaseTunerLayer, merged: torch.Tensor) -> None:
        """Put `merged`, in the layout and the dtype of the original, in the place of the weight."""
        if tuner_layer.quantization_backend is not None:
            self._replace(tuner_layer, self._dense(merged))
        elif isinstance(self.weight, DTensor):
            weight = self.weight
            with torch.no_grad():
                self.shard = weight.to_local().clone() if self.shard is None else self.shard
                weight.copy_(distribute_tensor(merged, weight.device_mesh, weight.placements))
        else:
            self.layer.weight = frozen_parameter(merged, like=self.weight)

    def restore(self, tuner_layer: BaseTunerLayer) -> None:
        """Put the original back: the same object, with the same bits."""
        if tuner_layer.quantization_backend is not None:
            self._replace(tuner_layer, self.layer)
        elif self.shard is not None:
            with torch.no_grad():
                self.weight.to_local().copy_(self.shard)
        else:
            now = self.layer.weight
            same = now.device == self.weight.device and now.dtype == self.weight.dtype
            self.layer.weight = self.weight if same else frozen_parameter(self.weight.detach(), like=now)

    def _dense(self, weight: torch.Tensor) -> nn.Linear:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        dense.bias = self.layer.bias
        return dense.train(self.layer.training)

    @staticmethod
    def _replace(tuner_layer: BaseTunerLayer, layer: nn.Module) -> None:
        # The quantised layer may lie inside another tuner's layer.
        outer = tuner_layer
        while hasattr(outer.base_layer, "base_layer"):
            outer = outer.base_layer
        outer.base_layer = layer
