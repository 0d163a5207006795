"""A linear layer with EDoRA adapters."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import nn

from hf_delta._compat.peft import SavedBuffers
from hf_delta.adapters.base import AdapterWeight, DeltaLinear
from hf_delta.adapters.edora.config import EdoraConfig
from hf_delta.adapters.edora.functions import (
    EdoraFunction,
    as_divisor,
    changed_row_norms,
    fused_forward,
    low_rank_output,
    scaled_change,
    top_factors,
)
from hf_delta.errors import InputError
from hf_delta.ops.norms import row_square_norms, times_transposed, widened


# Largest relative difference of saved factors and those of the weight. Rounding to 4 bits makes less than 0.1, another
# base model about 1.
FACTOR_TOLERANCE = 0.3


class NormConstants(NamedTuple):
    """What the norms of one adapter need of the weight."""

    key: Hashable
    cross: torch.Tensor
    gram: torch.Tensor


class Folded(NamedTuple):
    """One adapter in the form that a forward without gradients takes, and what it was made from."""

    key: Hashable
    trained: list[torch.Tensor]
    right: torch.Tensor
    outer: torch.Tensor
    gain: torch.Tensor | None


class EdoraLinear(DeltaLinear):
    """`W' = diag(m / n) (W + s U R A)`: `U`, `A = U^T W` frozen and saved, `R` `(r, r)` and `m` `(o,)` trained.

    `n` is the norm of each row of the bracket, without gradient, from quantities of size `o r`: the norms of the rows of
    `W`, which are saved with the adapter, and `W A^T`, which is computed once in the first forward. With gradients it is
    computed in every forward.
    """

    adapter_layer_names = ("hfd_edora_core", "hfd_edora_magnitude")
    other_param_names = (
        "hfd_edora_left",
        "hfd_edora_right",
        "hfd_edora_norm",
        "hfd_edora_scaling",
        "hfd_edora_dropout",
        "hfd_edora_source",
    )

    def create_attributes(self) -> None:
        self.hfd_edora_core = nn.ModuleDict()
        self.hfd_edora_magnitude = nn.ModuleDict()
        self.hfd_edora_left = SavedBuffers()
        self.hfd_edora_right = SavedBuffers()
        self.hfd_edora_norm = SavedBuffers()
        self.hfd_edora_scaling: dict[str, float] = {}
        self.hfd_edora_dropout: dict[str, float] = {}
        self.hfd_edora_source: dict[str, tuple] = {}
        self._constants: dict[str, NormConstants] = {}
        self._folds: dict[str, Folded] = {}
        # Frozen tensors change in one way: they are loaded.
        self.register_load_state_dict_post_hook(_forget_all)

    def add_adapter(self, adapter: str, config: EdoraConfig) -> None:
        """
        Raises:
            `InputError`: `r` is larger than a side of the weight.
        """
        smaller = min(self.in_features, self.out_features)
        if config.r > smaller:
            raise InputError(
                f"r is {config.r}, and a weight of {self.out_features} x {self.in_features} has {smaller} singular "
                f"vectors: write r of at most {smaller}, or leave this layer out of target_modules."
            )
        source = (config.r, config.svd, config.svd_niter, config.seed)
        left, right, norm = self._frozen(config, source)
        core = torch.zeros(config.r, config.r, dtype=left.dtype, device=left.device)
        if config.sigma and not self.is_placeholder(config):
            core.normal_(std=config.sigma)
        self.hfd_edora_core[adapter] = AdapterWeight(core)
        self.hfd_edora_left[adapter], self.hfd_edora_right[adapter] = left, right
        for container in (self.hfd_edora_magnitude, self.hfd_edora_norm):
            if adapter in container:
                del container[adapter]
        if config.magnitude:
            self.hfd_edora_magnitude[adapter] = AdapterWeight(norm.clone())
            self.hfd_edora_norm[adapter] = norm
        self.hfd_edora_scaling[adapter] = config.alpha / config.r
        self.hfd_edora_dropout[adapter] = config.dropout
        self.hfd_edora_source[adapter] = source
        self._constants.pop(adapter, None)
        self._folds.pop(adapter, None)

    def _frozen(self, config: EdoraConfig, source: tuple) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`U`, `A` and the norms of the rows: zeros to be filled from a file, those of an equal adapter, or new ones."""
        if self.is_placeholder(config):
            weight = self.get_base_layer().weight
            shapes = (self.out_features, config.r), (config.r, self.in_features), (self.out_features,)
            return tuple(torch.zeros(shape, dtype=widened(weight.dtype), device=weight.device) for shape in shapes)
        weight = self.original_weight()
        norm = row_square_norms(weight).sqrt_()
        for other, known in self.hfd_edora_source.items():
            if known == source and other in self.adapters:
                return self.hfd_edora_left[other].clone(), self.hfd_edora_right[other].clone(), norm
        return *top_factors(weight, config.r, config.svd, config.svd_niter, config.seed), norm

    def check_adapter(self, adapter: str) -> None:
        """
        Raises:
            `InputError`: values that are not finite, or factors that are not those of this base weight.
        """
        super().check_adapter(adapter)
        with torch.no_grad(), _no_autocast(self.hfd_edora_left[adapter]):
            weight = self.original_weight()
            wide = widened(weight.dtype)
            left, right = self.hfd_edora_left[adapter].to(wide), self.hfd_edora_right[adapter].to(wide)
            difference = torch.linalg.norm(times_transposed(weight.T, left.T).T - right)
            if difference > FACTOR_TOLERANCE * torch.linalg.norm(right) or not left.any():
                raise InputError(
                    f"adapter {adapter!r}: its frozen singular vectors are not those of this layer's weight "
                    f"({self.out_features} x {self.in_features}), so that it was made for another base model, or its file "
                    "is incomplete. Load the base model that adapter_config.json names."
                )
            if adapter in self.hfd_edora_magnitude:
                self._check_magnitude(adapter, row_square_norms(weight).sqrt_())

    def _check_magnitude(self, adapter: str, expected: torch.Tensor) -> None:
        # Zeros stand where a file that is to give the values did not have them, and would silence the whole layer.
        norm, magnitude = self.hfd_edora_norm[adapter], self.hfd_edora_magnitude[adapter].weight
        far = torch.linalg.norm(norm.to(expected.dtype) - expected) > FACTOR_TOLERANCE * torch.linalg.norm(expected)
        if far or (norm.any() and not magnitude.any()):
            raise InputError(
                f"adapter {adapter!r}: its magnitudes or the norms of the rows are missing or not those of this layer's "
                f"weight ({self.out_features} x {self.in_features}): the file is incomplete, or was written with magnitude: "
                "false. Take adapter_config.json and adapter_model.safetensors as one save_pretrained wrote them."
            )

    # -- the change -------------------------------------------------------------------------------------------------
    def delta_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        a, b = self._low_rank(adapter)
        change = b @ a
        if adapter not in self.hfd_edora_magnitude:
            return change
        gain = self._gain(adapter)[:, None]
        return (gain - 1) * weight.to(change.dtype) + gain * change

    def delta_output(self, adapter: str, x: torch.Tensor, base_output: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(x, self.hfd_edora_dropout[adapter], self.training)
        right, left = self.hfd_edora_right[adapter], self.hfd_edora_left[adapter]
        core = self.hfd_edora_core[adapter].weight
        if not torch.is_autocast_enabled(x.device.type):
            right, core, left = right.to(x.dtype), core.to(x.dtype), left.to(x.dtype)
        low_rank = low_rank_output(x, right, core, left, self.hfd_edora_scaling[adapter])
        if adapter not in self.hfd_edora_magnitude:
            return low_rank
        return scaled_change(base_output, self.base_bias, low_rank, self._gain(adapter))

    def fused_output(
        self, adapter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.training and self.hfd_edora_dropout[adapter]:
            return None
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled():
            output = self._trained_output(adapter, rows, weight, bias)
        else:
            folded = self._folded(adapter, x.dtype)
            output, _ = fused_forward(rows, weight, bias, rows @ folded.right.T, folded.outer, folded.gain)
        return output.view(*x.shape[:-1], self.out_features)

    def _trained_output(
        self, adapter: str, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        right, left = self.hfd_edora_right[adapter].to(rows.dtype), self.hfd_edora_left[adapter].to(rows.dtype)
        magnitude = norms = None
        if adapter in self.hfd_edora_magnitude:
            magnitude, norms = self.hfd_edora_magnitude[adapter].weight, self._norms(adapter)
        core, scaling = self.hfd_edora_core[adapter].weight, self.hfd_edora_scaling[adapter]
        return EdoraFunction.apply(rows, weight, bias, right, left, core, magnitude, norms, scaling)

    def _folded(self, adapter: str, dtype: torch.dtype) -> Folded:
        """What one forward without gradients needs, kept while every tensor that it comes from has the same values.

        Values are compared and not versions, which fused optimizers do not raise. Only on the CPU: elsewhere comparing
        would wait for the device in each layer of each token.
        """
        key = self.weight_key()
        trained = [self.hfd_edora_core[adapter].weight]
        if adapter in self.hfd_edora_magnitude:
            trained.append(self.hfd_edora_magnitude[adapter].weight)
        known = self._folds.get(adapter)
        if known is not None and known.key == key and all(map(torch.equal, known.trained, trained)):
            return known
        right, outer = (factor.to(dtype) for factor in self._low_rank(adapter))
        gain = self._gain(adapter) if len(trained) == 2 else None
        folded = Folded(key, [weight.detach().clone() for weight in trained], right, outer, gain)
        if right.device.type == "cpu":
            self._folds[adapter] = folded
        return folded

    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if adapter in self.hfd_edora_magnitude else self._low_rank(adapter)

    def dora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`A` `(r, i)`, `B` `(o, r)` and `m` `(o,)` of the DoRA adapter that is this one, in float32.

        DoRA takes the norms of `W + B A` from the weight that it is given; `m` is such that its gain is the one here,
        also where the adapter was trained on a quantised weight.

        Raises:
            `InputError`: the adapter has no magnitude.
        """
        if adapter not in self.hfd_edora_magnitude:
            raise InputError(f"adapter {adapter!r} has no magnitude (magnitude: false): it is a LoRA, not a DoRA.")
        a, b = self._low_rank(adapter)
        weight = self.original_weight()
        cross, gram = 2 * times_transposed(weight, a), a @ a.T
        norms = changed_row_norms(row_square_norms(weight).sqrt_(), cross, gram, b)
        return a, b, self._gain(adapter).detach() * norms

    @torch.no_grad()
    def _low_rank(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        wide = widened(self.hfd_edora_left[adapter].dtype)
        change = self.hfd_edora_left[adapter].to(wide) @ self.hfd_edora_core[adapter].weight.to(wide)
        return self.hfd_edora_right[adapter].to(wide), change * self.hfd_edora_scaling[adapter]

    # -- norms ------------------------------------------------------------------------------------------------------
    def _gain(self, adapter: str) -> torch.Tensor:
        """`g = m / n`, `(o,)`, with a gradient to `m`."""
        # A quotient and not a product with the reciprocal: `m / m` is 1 to the last bit.
        return self.hfd_edora_magnitude[adapter].weight / self._norms(adapter)

    @torch.no_grad()
    def _norms(self, adapter: str) -> torch.Tensor:
        """`n`, `(o,)`, for the core as it is now; infinite for rows of zeros."""
        _, cross, gram = self._norm_constants(adapter)
        with _no_autocast(cross):
            change = self.hfd_edora_left[adapter].to(cross.dtype) @ self.hfd_edora_core[adapter].weight.to(cross.dtype)
            change *= self.hfd_edora_scaling[adapter]
            norms = changed_row_norms(self.hfd_edora_norm[adapter].to(cross.dtype), cross, gram, change)
        return as_divisor(norms)

    def _norm_constants(self, adapter: str) -> NormConstants:
        """`2 W A^T` and `A A^T`, computed again when the weight is another one."""
        key = self.weight_key()
        known = self._constants.get(adapter)
        if known is None or known.key != key:
            right = self.hfd_edora_right[adapter]
            with _no_autocast(right):
                weight = self.original_weight()
                wide = right.to(widened(weight.dtype))
                known = NormConstants(key, 2 * times_transposed(weight, wide), wide @ wide.T)
            self._constants[adapter] = known
        return known


def _no_autocast(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _forget_all(layer: EdoraLinear, incompatible_keys) -> None:
    layer._constants.clear()
    layer._folds.clear()
