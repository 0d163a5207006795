"""A linear layer with Bone adapters, each in a mode of its own."""

from collections.abc import Callable
from math import gcd

import torch
from torch import nn

from hf_delta.adapters.base import AdapterWeight, DeltaLinear
from hf_delta.adapters.bone.additive import (
    AdditiveLinear,
    additive_delta,
    additive_factors,
    additive_output,
    fold,
    row_delta,
    row_factors,
    row_linear,
    row_output,
    tile,
)
from hf_delta.adapters.bone.bat import BatColLinear, bat_col_delta, bat_row_delta, bat_row_linear, block_inputs
from hf_delta.adapters.bone.config import BoneConfig
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_tensor


class BoneLinear(DeltaLinear):
    """Adds to `W (o, i)` the change that [`BoneConfig`] describes; `D` is the only tensor of an adapter.

    One layer may have adapters of different modes, also active together.
    """

    adapter_layer_names = ("hfd_bone_block",)
    other_param_names = ("hfd_bone_mode", "hfd_bone_dropout")

    def create_attributes(self) -> None:
        self.hfd_bone_block = nn.ModuleDict()
        self.hfd_bone_dropout = nn.ModuleDict()
        self.hfd_bone_mode: dict[str, str] = {}
        # Adapters whose values are still to be read from a directory of PEFT's Bone, under other names.
        self.old_names: set[str] = set()

    def add_adapter(self, adapter: str, config: BoneConfig) -> None:
        shape = block_shape(config, self.in_features, self.out_features)
        backend = self.quantization_backend
        if config.mode == "bat_col" and backend is not None and not backend.supports_merge:
            raise InputError(
                f"mode: bat_col needs the weight itself, and {backend.backend_name} cannot dequantise it: take mode: "
                "bat_row, which does not."
            )
        self.hfd_bone_mode[adapter] = config.mode
        self.hfd_bone_dropout[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.hfd_bone_block[adapter] = AdapterWeight(torch.zeros(shape))
        self.old_names.discard(adapter)
        if getattr(config, "old_names", False):
            self.old_names.add(adapter)

    def check_adapter(self, adapter: str) -> None:
        super().check_adapter(adapter)
        if adapter in self.old_names:
            raise InputError(
                f"adapter {adapter!r} was saved by the Bone of PEFT 0.14 to 0.18 and its tensors were not read: load it "
                "with peft's PeftModel.from_pretrained or load_adapter, or convert it once with "
                "hf_delta.adapters.bone.convert_to_bone(source, out)."
            )

    @torch.no_grad()
    def delta_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        block = self._whole_block(adapter).to(weight.device, wide)
        mode = self.hfd_bone_mode[adapter]
        if mode == "row":
            return row_delta(block, self.out_features)
        if mode == "bat_row":
            return bat_row_delta(weight.to(wide), block)
        if mode == "bat_col":
            return bat_col_delta(weight.to(wide), block)
        return additive_delta(block, self.out_features, self.in_features)

    @torch.no_grad()
    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        block = self._whole_block(adapter).float()
        mode = self.hfd_bone_mode[adapter]
        if mode == "row":
            return row_factors(block, self.out_features)
        if mode in ("bat_row", "bat_col"):
            return None
        return additive_factors(block, self.out_features, self.in_features)

    def delta_output(self, adapter: str, x: torch.Tensor, base_output: torch.Tensor) -> torch.Tensor:
        block = self._block(adapter, x.dtype)
        x = self.hfd_bone_dropout[adapter](x)
        mode = self.hfd_bone_mode[adapter]
        if mode == "row":
            return row_output(x, block, self.out_features)
        if mode == "bat_row":
            u = block_inputs(x, block)
            # Only the frozen layer itself knows how it multiplies; its bias is not part of the change.
            moved = self.base_layer(u.to(x.dtype))
            moved = moved if self.base_bias is None else moved - self.base_bias.to(moved.dtype)
            return moved + self._tiled(u, block).to(moved.dtype)
        if mode == "bat_col":
            return self._bat_col_change(x, block)
        return tile(fold(x, block.shape[0]) @ block, self.out_features)

    def single_output(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        if self.hfd_bone_mode[adapter] != "bat_row":
            return super().single_output(adapter, x)
        block = self._block(adapter, x.dtype)
        u = block_inputs(self.hfd_bone_dropout[adapter](x), block)
        output = self.base_layer(x + u.to(x.dtype))
        return output + self._tiled(u, block).to(output.dtype)

    def fused_output(
        self, adapter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        dropout, mode = self.hfd_bone_dropout[adapter], self.hfd_bone_mode[adapter]
        needs_graph = torch.is_grad_enabled()
        if (needs_graph and mode in ("row", "bat_row")) or (self.training and isinstance(dropout, nn.Dropout)):
            return None
        block, tokens = self._block(adapter, x.dtype), x.reshape(-1, x.shape[-1])
        if mode == "bat_col":
            output = BatColLinear.apply(tokens, weight, bias, block, False)
        elif needs_graph:
            output = AdditiveLinear.apply(tokens, weight, bias, block)
        elif mode == "row":
            output = row_linear(tokens, weight, bias, block)
        elif mode == "bat_row":
            output = bat_row_linear(tokens, weight, bias, block)
        else:
            output, _ = additive_output(tokens, weight, bias, block)
        return output.view(*x.shape[:-1], self.out_features)

    def _bat_col_change(self, x: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # A quantised weight is dequantised again in the backward pass instead of being kept.
        weight: torch.Tensor | Callable = (
            self.original_weight() if self.quantization_backend is None else self.original_weight
        )
        tokens = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(device, enabled=False):
            change = BatColLinear.apply(tokens, weight, None, block.to(dtype), True)
        return change.view(*x.shape[:-1], self.out_features)

    def _tiled(self, u: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        return tile(fold(u, block.shape[1]), self.out_features)

    def _block(self, adapter: str, dtype: torch.dtype) -> torch.Tensor:
        return self.hfd_bone_block[adapter].weight.to(dtype)

    def _whole_block(self, adapter: str) -> torch.Tensor:
        return full_tensor(self.hfd_bone_block[adapter].weight)


def block_shape(config: BoneConfig, in_features: int, out_features: int) -> tuple[int, ...]:
    """Shape of the trained block on a layer of this size.

    Raises:
        `InputError`: the sizes of the configuration do not fit the layer, with sizes that do.
    """
    r, mode = config.r, config.mode
    if mode == "row":
        _check_divides("r", r, "output", out_features)
        return r, in_features
    if mode in ("bat_row", "bat_col"):
        if in_features % r or out_features % r:
            fitting = _largest_divisor(gcd(in_features, out_features), r)
            raise InputError(
                f"mode: {mode} cuts the weight into blocks of r x r, and r = {r} does not divide both the {in_features} "
                f"inputs and the {out_features} outputs of this layer: take r = {fitting}, or mode: bone."
            )
        return (in_features if mode == "bat_row" else out_features) // r, r, r
    if r > in_features:
        raise InputError(
            f"r = {r} is larger than the {in_features} inputs of this layer: take r = {in_features} or less."
        )
    if mode == "bone":
        return r, out_features
    _check_divides("mini_r", config.mini_r, "output", out_features)
    return r, config.mini_r


def _check_divides(name: str, value: int, side: str, size: int) -> None:
    if size % value:
        raise InputError(
            f"{name} = {value} does not divide the {size} {side}s of this layer: take {name} = "
            f"{_largest_divisor(size, value)}."
        )


def _largest_divisor(size: int, limit: int) -> int:
    return next(number for number in range(min(size, limit), 0, -1) if size % number == 0)
