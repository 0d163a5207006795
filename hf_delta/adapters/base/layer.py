"""A linear layer with adapters: forward with several of them, merging that can be undone bit for bit, mixed batches."""

from collections.abc import Hashable
from operator import attrgetter
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_delta._compat.peft import TunerLayerHooks, in_out_features
from hf_delta._compat.torch import is_plain_parameter, runs_plainly, write_count
from hf_delta.adapters.base.config import DeltaAdapterConfig
from hf_delta.adapters.base.merging import MergedWeight
from hf_delta.errors import InputError
from hf_delta.ops.gather import into_shards, whole_parameters


class AdapterWeight(nn.Module):
    """One trainable tensor of one adapter.

    A module, so that parameter names end in `.<adapter>.weight`: TRL finds the weights of a reference adapter by that.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class DeltaLinear(nn.Module, TunerLayerHooks):
    """Base of the adapted layers over `nn.Linear`, `Conv1D` and quantised linear layers.

    The frozen weight is `W`, `(o, i)`. Several active adapters add up, each relative to `W`:
    `W' = W + sum_a delta_a(W)`.

    A method implements `create_attributes`, `add_adapter`, `delta_weight`, `delta_output` and `lora_factors`, and may
    implement `fused_output` and `single_output`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: DeltaAdapterConfig, **quantization: Any):
        super().__init__()
        self.base_layer = base_layer
        # The name in the model, for messages; the tuner knows it.
        self.path = type(self).__name__
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization)
        self.in_features, self.out_features = in_out_features(self.get_base_layer())
        self.start_unmerged(adapter_name)
        self.mixed_adapters: tuple[list[str], int] | None = None
        self.unchecked: set[str] = set()
        self._merged_weight: MergedWeight | None = None
        self.create_attributes()
        self.update_layer(adapter_name, config)

    # -- what a method implements -----------------------------------------------------------------------------------
    def create_attributes(self) -> None:
        """Make the empty containers, keyed by adapter, that `adapter_layer_names` and `other_param_names` name."""
        raise TypeError(f"{type(self).__name__} does not say what it keeps")

    def add_adapter(self, adapter: str, config: DeltaAdapterConfig) -> None:
        """Fill the containers for one adapter.

        Raises:
            `InputError`: the adapter does not fit the size of this layer.
        """
        raise TypeError(f"{type(self).__name__} does not say what an adapter has")

    def delta_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the whole original weight `(o, i)`, in float32 or wider."""
        raise TypeError(f"{type(self).__name__} does not say what it adds to a weight")

    def delta_output(self, adapter: str, x: torch.Tensor, base_output: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to `base_output = base_layer(x)`, `(..., o)`; any base, also under autocast."""
        raise TypeError(f"{type(self).__name__} does not say what it adds to an output")

    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """`A` `(k, i)` and `B` `(o, k)` in float32 with `B @ A` exactly the adapter's change; None if there are none."""
        return None

    def single_output(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """The whole output `(..., o)` with one active adapter, on any base."""
        output = self.base_layer(x)
        return output + self.delta_output(adapter, x, output).to(output.dtype)

    def fused_output(
        self, adapter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The same on a plain dense `nn.Linear` without autocast; None where the method has no shorter way."""
        return None

    def check_adapter(self, adapter: str) -> None:
        """Run once before an adapter is first used, when saved values are in place.

        Raises:
            `InputError`: its tensors cannot be right for this layer.
        """
        own = {f"{name}.{adapter}" for name in (*self.adapter_layer_names, *self.other_param_names)}
        # Not from state_dict, which under FSDP2 puts a layer back into shards in the middle of its forward; and each by its
        # name, because ZeRO-3 gathers in a forward what an attribute is read for, and leaves it empty in an iteration. Not by
        # get_parameter: under FSDP 1 what is found may be a plain tensor.
        found = [(n, attrgetter(n)(self)) for n, _ in self.named_parameters() if n.removesuffix(".weight") in own]
        found += [(n, tensor) for n, tensor in self.named_buffers() if n in own]
        for name, tensor in found:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(
                    f"adapter {adapter!r}: {name} holds NaN or infinite values, so the file that it came from is broken "
                    "or training diverged; go back to an earlier checkpoint."
                )

    # -- what a method may use --------------------------------------------------------------------------------------
    @property
    def adapters(self) -> list[str]:
        """Names of the adapters of this layer."""
        return list(getattr(self, self.adapter_layer_names[0]))

    @property
    def adapter_modules(self) -> list[nn.ModuleDict]:
        """What holds the trained weights."""
        return [getattr(self, name) for name in self.adapter_layer_names]

    @property
    def base_bias(self) -> torch.Tensor | None:
        return getattr(self.get_base_layer(), "bias", None)

    def is_placeholder(self, config: DeltaAdapterConfig) -> bool:
        """Whether values will come from a file, so that nothing is to be derived from the weight now."""
        return bool(config.inference_mode) or self.get_base_layer().weight.device.type == "meta"

    def original_weight(self) -> torch.Tensor:
        """The frozen weight `(o, i)` without any adapter, dequantised and whole, also while adapters are merged.

        Collective where the weight is sharded.
        """
        source = MergedWeight(self.get_base_layer()) if self._merged_weight is None else self._merged_weight
        weight = source.original(self.quantization_backend)
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight

    def weight_key(self) -> Hashable:
        """Something that changes when the base weight was exchanged, moved, cast, or written where autograd sees it."""
        weight = self.get_base_layer().weight
        return weight.data_ptr(), write_count(weight), weight.dtype, weight.device

    # -- PEFT -------------------------------------------------------------------------------------------------------
    def update_layer(self, adapter_name: str, config: DeltaAdapterConfig) -> None:
        """Add an adapter, or replace the one of this name."""
        self.add_adapter(adapter_name, config)
        self.unchecked.add(adapter_name)
        self.move_adapter(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to the weight, in the layout of the base layer."""
        with whole_parameters(*self.adapter_modules):
            delta = self.delta_weight(adapter, self.original_weight())
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put `W + sum delta` in the place of `W`, which is kept for [`unmerge`].

        The base layer gets another parameter object and a quantised base layer is replaced by a dense one, so that the
        original is not touched; what was tied to it stays as it was.

        Raises:
            `ValueError`: with `safe_merge`, a merged weight that is not finite; nothing was changed.
        """
        names = [name for name in self.not_yet_merged(adapter_names) if name in self.adapters]
        if not names:
            return
        self.into_shards()
        weight = self.original_weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        with torch.no_grad(), whole_parameters(*self.adapter_modules):
            self.check_new(names)
            merged = weight.to(wide, copy=True)
            for name in [*self.merged_adapters, *names]:
                merged += self.delta_weight(name, weight)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaN or infinite values in the weights with {', '.join(names)} merged; nothing was merged."
            )
        if self._merged_weight is None:
            self._merged_weight = MergedWeight(self.get_base_layer())
        merged = merged.to(weight.dtype)
        self._merged_weight.install(self, merged.T if isinstance(self.get_base_layer(), Conv1D) else merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if self._merged_weight is not None:
            self.into_shards()
            self._merged_weight.restore(self)
        self._merged_weight = None
        self.merged_adapters.clear()

    def into_shards(self) -> None:
        """Have FSDP2 take back what it left whole after a forward; the flags and values of those copies do not last."""
        # A quantised layer rearranges its weight when its state is asked for.
        base = [self.get_base_layer()] if self.quantization_backend is None else []
        into_shards(*base, *self.adapter_modules)

    def enable_adapters(self, enabled: bool) -> None:
        """Let adapters count, or not; merged ones are taken out of the weight."""
        # Not left to the forward: there FSDP has put a whole copy in the place of the weight, with the adapters in it.
        self.into_shards()
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)

    # -- forward ----------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if self.mixed_adapters is not None:
            return self._mixed_output(x)
        names = [] if self.merged else [name for name in self.active_adapters if name in self.adapters]
        if self.unchecked:
            self.check_new(names)
        if len(names) == 1:
            return self._output_of_one(names[0], x)
        output = total = self.base_layer(x)
        for name in names:
            total = total + self.delta_output(name, x, output).to(output.dtype)
        return total

    def _output_of_one(self, name: str, x: torch.Tensor) -> torch.Tensor:
        base = self.base_layer
        if type(base) is nn.Linear and self._can_fuse(base, x):
            output = self.fused_output(name, x, base.weight, base.bias)
            if output is not None:
                return output
        return self.single_output(name, x)

    @staticmethod
    def _can_fuse(base: nn.Linear, x: torch.Tensor) -> bool:
        weight, bias = base.weight, base.bias
        return (
            is_plain_parameter(weight)
            and x.dtype == weight.dtype
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and runs_plainly(base)
        )

    def _mixed_output(self, x: torch.Tensor) -> torch.Tensor:
        names, beams = self.mixed_adapters
        if self.merged:
            # PEFT's words, so that what knows its errors knows ours.
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(x) not in (len(names), len(names) * beams):
            raise ValueError(
                f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {len(x)} "
                "respectively. Layers that see tokens regrouped (experts) cannot take part in a mixed batch."
            )
        names = [name for name in names for _ in range(len(x) // len(names))]
        output = self.base_layer(x)
        total = output.clone()
        for name in sorted(set(names) & set(self.adapters)):
            self.check_new([name])
            rows = torch.tensor([row for row, other in enumerate(names) if other == name], device=x.device)
            total[rows] += self.delta_output(name, x[rows], output[rows]).to(total.dtype)
        return total

    def check_new(self, names: list[str]) -> None:
        """Run [`check_adapter`] for those of these adapters that were not checked since they were made or loaded."""
        for name in [name for name in names if name in self.unchecked]:
            if self.get_base_layer().weight.device.type != "meta":
                # Without gradients: under checkpointing, the second forward must save what the first one did.
                try:
                    with torch.no_grad():
                        self.check_adapter(name)
                except InputError as error:
                    raise InputError(f"{self.path}, {error}") from error
            self.unchecked.discard(name)

    def __repr__(self) -> str:
        return "hf_delta." + super().__repr__()
