"""A linear layer with PMSS adapters."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from hf_delta._compat.peft import SavedBuffers
from hf_delta._compat.torch import write_count
from hf_delta.adapters.base import AdapterWeight, DeltaLinear
from hf_delta.adapters.pmss.cache import cached_selection
from hf_delta.adapters.pmss.config import PmssConfig
from hf_delta.adapters.pmss.functions import (
    PROBES,
    PmssFunction,
    pmss_delta,
    pmss_linear,
    pmss_output,
    probes_distance,
    skeleton_probes,
)
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_tensor


# How far the intersection of rows and columns may be from the one that the adapter was trained with, relative to its
# norm. Rounding to 16 bits moves it by 0.002, to 4 bits by 0.1; two unrelated weights are 1.4 apart.
SAME_WEIGHT = 0.02
SAME_WEIGHT_QUANTISED = 0.5


class Settings(NamedTuple):
    """What a layer keeps of the configuration of one adapter."""

    selection: tuple[int, str, int, int]
    cache_dir: str | None
    alpha: float
    normalize: bool
    dropout: float


class Gathered(NamedTuple):
    """Columns `(o, k)`, and where they cannot be read from the output also rows `(k, i)`, with what they came from."""

    source: Hashable
    columns: torch.Tensor
    rows: torch.Tensor | None


class PmssLinear(DeltaLinear):
    """`W' = W + s C U R`, with `R = W[rows]`, `C = W[:, columns]` and the trained core `U`, `(k, k)`, zero at first.

    Saved with an adapter: the core; the indices; and a record of the skeleton by which another base model is noticed.
    """

    adapter_layer_names = ("hfd_pmss_core",)
    other_param_names = (
        "hfd_pmss_rows",
        "hfd_pmss_columns",
        "hfd_pmss_record",
        "hfd_pmss_settings",
        "hfd_pmss_scaling",
        "hfd_pmss_gathered",
    )

    def create_attributes(self) -> None:
        self.hfd_pmss_core = nn.ModuleDict()
        self.hfd_pmss_rows = SavedBuffers()
        self.hfd_pmss_columns = SavedBuffers()
        # Mean norm of `C`, that of `R`, whether `W` is quantised, and `skeleton_probes`: float64, as the integers with
        # the same bits, because PEFT casts buffers of floating point to the dtype of the base.
        self.hfd_pmss_record = SavedBuffers()
        self.hfd_pmss_settings: dict[str, Settings] = {}
        self.hfd_pmss_scaling: dict[str, float] = {}
        self.hfd_pmss_gathered: dict[str, Gathered] = {}

    def add_adapter(self, adapter: str, config: PmssConfig) -> None:
        k, largest = config.r, min(self.out_features, self.in_features)
        if k > largest:
            raise InputError(
                f"r is {k}, and a {self.out_features}x{self.in_features} weight has no {k} rows and columns to choose: "
                f"write r: {largest} or less, or leave this layer out with exclude_modules."
            )
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise InputError(
                f"PMSS needs rows and columns of the weight, and {backend.backend_name} cannot dequantise it: take method: "
                "bone, which does not look at the weight."
            )
        self.hfd_pmss_core[adapter] = AdapterWeight(torch.zeros(k, k))
        self.hfd_pmss_settings[adapter] = Settings(
            (k, config.selection, config.seed, config.sketch_oversample),
            config.cache_dir,
            float(config.alpha),
            config.normalize,
            float(config.dropout),
        )
        self.hfd_pmss_gathered.pop(adapter, None)
        self.hfd_pmss_rows[adapter] = torch.full((k,), -1)
        self.hfd_pmss_columns[adapter] = torch.full((k,), -1)
        self.hfd_pmss_record[adapter] = torch.zeros(4 + PROBES, dtype=torch.int64)
        # PEFT's low_cpu_mem_usage makes new parameters on the meta device while the base has values.
        if not (self.is_placeholder(config) or self.core(adapter).is_meta):
            self._select(adapter)

    def _select(self, adapter: str) -> None:
        settings = self.hfd_pmss_settings[adapter]
        for other, its in self.hfd_pmss_settings.items():
            # Chosen anew on another device, they might differ; and a reference adapter has to have the same.
            if other != adapter and its.selection == settings.selection and self._has_selection(other):
                for buffers in (self.hfd_pmss_rows, self.hfd_pmss_columns, self.hfd_pmss_record):
                    buffers[adapter] = buffers[other].clone()
                return
        weight = self.original_weight()
        k, method, seed, oversample = settings.selection
        rows, columns = cached_selection(weight, k, method, seed, oversample, settings.cache_dir)
        self.hfd_pmss_rows[adapter], self.hfd_pmss_columns[adapter] = rows, columns
        norms = [
            float(torch.linalg.vector_norm(factor.float(), dim=dim).mean())
            for factor, dim in ((weight.index_select(1, columns), 0), (weight.index_select(0, rows), 1))
        ]
        head = torch.tensor([*norms, float(self.quantization_backend is not None)], dtype=torch.float64)
        record = torch.cat([head, skeleton_probes(weight, rows, columns)])
        self.hfd_pmss_record[adapter] = record.view(torch.int64).to(rows.device)

    def _has_selection(self, adapter: str) -> bool:
        rows = self.hfd_pmss_rows[adapter]
        return not rows.is_meta and bool((rows >= 0).all())

    # -- saved values -----------------------------------------------------------------------------------------------
    def check_adapter(self, adapter: str) -> None:
        super().check_adapter(adapter)
        rows, columns = self.hfd_pmss_rows[adapter], self.hfd_pmss_columns[adapter]
        if bool((rows == -1).all()) and bool((columns == -1).all()):
            if bool(self.core(adapter).any()):
                raise InputError(
                    f"adapter {adapter!r}: there is a core but there are no indices, which are saved as "
                    "hfd_pmss_rows and hfd_pmss_columns; the file is not complete, save the adapter again with "
                    "save_pretrained."
                )
            # Made for inference and never loaded: the start of a new adapter.
            with torch.inference_mode(False):
                self._select(adapter)
            rows, columns = self.hfd_pmss_rows[adapter], self.hfd_pmss_columns[adapter]
        self._check_range(adapter, "hfd_pmss_rows", rows, self.out_features)
        self._check_range(adapter, "hfd_pmss_columns", columns, self.in_features)
        saved = self.hfd_pmss_record[adapter].to("cpu").view(torch.float64)
        self._check_base(adapter, saved, skeleton_probes(self.original_weight(), rows, columns))
        settings = self.hfd_pmss_settings[adapter]
        size = float(saved[0] * saved[1]) if settings.normalize else 1.0
        # Norms of zero belong to a change of zero.
        self.hfd_pmss_scaling[adapter] = settings.alpha / (size or 1.0)

    def _check_range(self, adapter: str, name: str, indices: torch.Tensor, size: int) -> None:
        if int(indices.min()) < 0 or int(indices.max()) >= size:
            raise InputError(
                f"adapter {adapter!r}: {name} goes from {int(indices.min())} to {int(indices.max())}, and "
                f"a {self.out_features}x{self.in_features} weight has 0 to {size - 1}; the file is broken or belongs to "
                "another model."
            )

    def _check_base(self, adapter: str, saved: torch.Tensor, found: torch.Tensor) -> None:
        rounded = bool(saved[2]) or self.quantization_backend is not None
        allowed = SAME_WEIGHT_QUANTISED if rounded else SAME_WEIGHT
        distance = probes_distance(saved[3:], found)
        if not distance <= allowed:
            raise InputError(
                f"adapter {adapter!r}: the selected rows and columns of a "
                f"{self.out_features}x{self.in_features} weight are not those that the adapter was trained with; they "
                f"differ by {distance:.2g} of their size, where rounding explains {allowed}. Load it on the base model that adapter_config.json names, in the same "
                "revision, or export it as LoRA, which carries its own numbers."
            )

    # -- computation ------------------------------------------------------------------------------------------------
    def core(self, adapter: str) -> torch.Tensor:
        """The trained `U`, `(k, k)`."""
        return self.hfd_pmss_core[adapter].weight

    @property
    def reads_output(self) -> bool:
        """Whether `R x` stands in the output of the base layer: not in that of a quantised layer, which rounds, nor in
        that of a layer with adapters of another kind."""
        return self.quantization_backend is None and not isinstance(self.base_layer, BaseTunerLayer)

    @torch.no_grad()
    def lora_factors(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor]:
        self.check_new([adapter])
        weight = self.original_weight()
        columns = weight.index_select(1, self.hfd_pmss_columns[adapter]).float()
        rows = weight.index_select(0, self.hfd_pmss_rows[adapter]).float()
        core = full_tensor(self.core(adapter)).float()
        return rows, (columns @ core).mul_(self.hfd_pmss_scaling[adapter])

    def delta_weight(self, adapter: str, weight: torch.Tensor) -> torch.Tensor:
        self.check_new([adapter])
        wide = torch.promote_types(weight.dtype, torch.float32)
        columns = weight.index_select(1, self.hfd_pmss_columns[adapter]).to(wide)
        rows = weight.index_select(0, self.hfd_pmss_rows[adapter]).to(wide)
        return pmss_delta(columns, self.core(adapter).to(wide), rows, self.hfd_pmss_scaling[adapter])

    def delta_output(self, adapter: str, x: torch.Tensor, base_output: torch.Tensor) -> torch.Tensor:
        if self.reads_output:
            rows, bias = self.hfd_pmss_rows[adapter], self.base_bias
            columns = self.gathered(adapter, base_output.dtype).columns
            read = base_output.index_select(-1, rows)
            if bias is not None:
                read = read - bias.index_select(0, rows).to(read.dtype)
        else:
            _, columns, factor = self.gathered(adapter, x.dtype)
            read = F.linear(x, factor)
        settings = self.hfd_pmss_settings[adapter]
        read = F.dropout(read, settings.dropout, self.training)
        return pmss_output(read, self.core(adapter).to(read.dtype), columns, self.hfd_pmss_scaling[adapter])

    def fused_output(
        self, adapter: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.training and self.hfd_pmss_settings[adapter].dropout:
            return None
        core, rows = self.core(adapter), self.hfd_pmss_rows[adapter]
        columns, scaling = self.gathered(adapter, x.dtype).columns, self.hfd_pmss_scaling[adapter]
        tokens = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled() and (x.requires_grad or core.requires_grad):
            indices = self.hfd_pmss_columns[adapter]
            output = PmssFunction.apply(tokens, weight, bias, core, rows, indices, columns, scaling)
        else:
            output, _ = pmss_linear(tokens, weight, bias, core, rows, columns, scaling)
        return output.view(*x.shape[:-1], self.out_features)

    def gathered(self, adapter: str, dtype: torch.dtype) -> Gathered:
        """The columns, and the rows where they are needed, copied once: a column is scattered over the whole weight."""
        source = self._source(adapter, dtype)
        held = self.hfd_pmss_gathered.get(adapter)
        if held is None or held.source != source:
            # Copies made in inference mode could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                held = self._shared(adapter, dtype, source) or self._gather(adapter, dtype, source)
            self.hfd_pmss_gathered[adapter] = held
        return held

    def _source(self, adapter: str, dtype: torch.dtype) -> Hashable:
        rows, columns = self.hfd_pmss_rows[adapter], self.hfd_pmss_columns[adapter]
        indices = rows.data_ptr(), write_count(rows), columns.data_ptr(), write_count(columns)
        return self.weight_key(), dtype, indices

    def _gather(self, adapter: str, dtype: torch.dtype, source: Hashable) -> Gathered:
        weight = self.original_weight()
        columns = weight.index_select(1, self.hfd_pmss_columns[adapter]).to(dtype)
        rows = None if self.reads_output else weight.index_select(0, self.hfd_pmss_rows[adapter]).to(dtype)
        return Gathered(source, columns, rows)

    def _shared(self, adapter: str, dtype: torch.dtype, source: Hashable) -> Gathered | None:
        """What another adapter with the same indices holds: a policy and its reference need one copy."""
        own = self.hfd_pmss_rows[adapter], self.hfd_pmss_columns[adapter]
        for other, held in self.hfd_pmss_gathered.items():
            its = self.hfd_pmss_rows[other], self.hfd_pmss_columns[other]
            if held.source == self._source(other, dtype) and all(map(torch.equal, own, its)):
                return Gathered(source, held.columns, held.rows)
        return None
