"""Any adapter as a plain LoRA that PEFT and vLLM load without hf_delta."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_delta.adapters.export.change import Factors, adapted_layers, dora_factors, exact_factors, weight_change
from hf_delta.adapters.export.disk import ADAPTER, SavedAdapter
from hf_delta.adapters.export.limits import check_only_factors, check_weight_change, vllm_rank
from hf_delta.adapters.export.quantised import Quantization
from hf_delta.adapters.export.result import LoraExport, ModuleError
from hf_delta.errors import InputError
from hf_delta.ops.lowrank import compress, error_of_factors, error_of_product, pad, truncated_svd


def to_lora(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    rank: int | None = None,
    max_error: float | None = None,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> LoraExport:
    """Write an adapter of a model as a plain LoRA, which changes the model as the adapter does, or nearly.

    Exact where the change of the weight has low rank by construction: LoRA itself, PMSS, MiSS and Bone `bone`, `row` and
    `mini`, EDoRA without magnitude. Otherwise the factors are the truncated singular value decomposition of the change, and
    `errors` says what it leaves out. The model is not changed.

    Args:
        model (`PeftModel` or `PreTrainedModel`): A model with adapters, none of them merged.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which of them.
        rank (`int`, *optional*): Largest rank to write, rounded up to one that vLLM takes; by default the adapter's own.
        max_error (`float`, *optional*): Refuse if a module leaves out more than this, in the relative Frobenius norm.
        dora (`bool`, *optional*, defaults to `False`): Write DoRA and EDoRA exactly, as a LoRA with `use_dora`. vLLM does
            not take that.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the factors.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar over the modules.

    Returns:
        [`LoraExport`]: with `config`, `state_dict`, `errors` and `save(out)`.

    Raises:
        `InputError`: there is no such adapter, it has trained more than such factors hold, its rank is beyond vLLM's list,
            or it leaves out more than `max_error`.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None:
        known = ", ".join(getattr(model, "peft_config", {})) or "none"
        raise InputError(f"adapter_name: the model has no adapter {adapter_name!r}; it has {known}.")
    check_exportable(config)
    layers = adapted_layers(model, adapter_name)
    names = _module_names(model)
    export = make_lora(config, layers, names, adapter_name, rank=rank, dora=dora, dtype=dtype, progress=progress)
    export.check(max_error)
    return export


def export_lora(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    dora: bool = False,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    progress: bool = False,
) -> LoraExport:
    """The same from a saved adapter, with the base weights of one module at a time in memory.

    Args:
        adapter (`str` or `Path`): Directory of the adapter.
        base (`str` or `Path`, *optional*): The base model; by default the one that the adapter names.
        quantization ([`Quantization`], *optional*): How the base model was loaded for training; by default what `run.json`
            beside the adapter says.

    Raises:
        `InputError`: as [`to_lora`], or an input is missing, broken or does not fit.
    """
    saved = SavedAdapter(adapter, base, quantization, check_exportable)
    options = {"rank": rank, "dora": dora, "dtype": dtype, "progress": progress}
    return make_lora(saved.config, saved.layers, saved.module_names, ADAPTER, loaded=saved.loaded, **options)


def check_exportable(config: PeftConfig) -> None:
    """
    Raises:
        `InputError`: an adapter with this configuration cannot be a LoRA.
    """
    check_weight_change(config)
    check_only_factors(config)


def make_lora(
    config: PeftConfig,
    layers: dict[str, BaseTunerLayer],
    names: Iterable[str],
    adapter: str,
    *,
    rank: int | None,
    dora: bool,
    dtype: torch.dtype,
    progress: bool,
    loaded: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> LoraExport:
    """The export of these layers; `loaded(name)` is a context in which the layer has its base weight."""
    largest = vllm_rank(_own_rank(config) if rank is None else rank)
    factors, errors, magnitudes, as_dora = {}, [], {}, False
    for name, layer in tqdm(layers.items(), desc="LoRA", unit="module", disable=not progress):
        try:
            with loaded(name), torch.no_grad():
                if dora:
                    b, a, magnitudes[name] = _exact_dora(layer, adapter, largest)
                    factors[name], error = _written(name, b, a, largest, dtype)
                else:
                    factors[name], error = _factors(name, layer, adapter, largest, dtype)
                    as_dora = as_dora or (error.frobenius > 0 and dora_factors(layer, adapter) is not None)
        except InputError as problem:
            raise InputError(f"{name}: {problem}") from problem
        errors.append(error)
    # An exact form may need less than the adapter's size says.
    written = vllm_rank(max(1, *(len(a) for _, a in factors.values()))) if rank is None else largest
    export = LoraExport(_lora_config(config, layers, names, written, dora), {}, errors, as_dora)
    export.state_dict.update(_state(layers, factors, magnitudes, written, dtype))
    return export


def _factors(
    name: str, layer: BaseTunerLayer, adapter: str, largest: int, dtype: torch.dtype
) -> tuple[Factors, ModuleError]:
    found = exact_factors(layer, adapter)
    if found is not None:
        return _written(name, *found, largest, dtype)
    change = weight_change(layer, adapter)
    _check_finite(change)
    if change.ndim != 2:
        raise InputError(f"a {type(layer.get_base_layer()).__name__} is no linear layer; use the format merged.")
    rank = min(largest, *change.shape)
    b, a = (factor.to(dtype) for factor in truncated_svd(change, rank))
    return (b, a), ModuleError(name, rank, False, *error_of_factors(change, b, a))


def _written(
    name: str, b: torch.Tensor, a: torch.Tensor, largest: int, dtype: torch.dtype
) -> tuple[Factors, ModuleError]:
    """Factors of a module as they are written, of at most rank `largest` and in `dtype`."""
    _check_finite(b, a)
    exact = len(a) <= largest and dtype == torch.float32
    kept = (b, a) if len(a) <= largest else compress(b, a, largest)
    new_b, new_a = (factor.to(dtype) for factor in kept)
    errors = (0.0, 0.0) if exact else error_of_product(b, a, new_b, new_a)
    return (new_b, new_a), ModuleError(name, len(new_a), exact, *errors)


def _exact_dora(layer: BaseTunerLayer, adapter: str, largest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    found = dora_factors(layer, adapter)
    if found is None:
        raise InputError("this is no DoRA: export it without the option for DoRA.")
    if len(found[1]) > largest:
        raise InputError(f"DoRA is exported whole, and its rank is {len(found[1])}: leave the rank out.")
    return found


def _check_finite(*tensors: torch.Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise InputError("the adapter gives NaN or infinite values: its file is broken, or training diverged.")


def _own_rank(config: PeftConfig) -> int:
    sizes = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    whole = [size for size in sizes if isinstance(size, int) and size > 0]
    if not whole:
        raise InputError(f"{config.peft_type.value} has no rank of its own: say which rank to write.")
    return max(whole)


def _state(layers, factors, magnitudes, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors by the names under which PEFT saves them."""
    state = {}
    for name, (b, a) in factors.items():
        b, a = pad(b, a, rank)
        embedding = isinstance(layers[name].get_base_layer(), nn.Embedding)
        ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        named = dict(zip(ends, (a, b)))
        if name in magnitudes:
            named["lora_magnitude_vector"] = magnitudes[name].to(dtype)
        # A clone, because the factors may be the adapter's own tensors.
        state |= {f"base_model.model.{name}.{end}": t.detach().cpu().clone().contiguous() for end, t in named.items()}
    return state


def _lora_config(config: PeftConfig, layers, names: Iterable[str], rank: int, dora: bool) -> LoraConfig:
    kinds = {isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        use_dora=dora,
        target_modules=_targets(set(layers), set(names)),
        fan_in_fan_out=kinds == {True},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _module_names(model: nn.Module) -> Iterator[str]:
    """Names of the base model's modules, as they are without adapters."""
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    inside = tuple(f"{name}." for name, module in root.named_modules() if isinstance(module, BaseTunerLayer))
    return (name for name, _ in root.named_modules() if name and not (inside and name.startswith(inside)))


def _targets(adapted: set[str], names: set[str]) -> list[str] | str:
    """`target_modules` that choose exactly these modules: last parts of names, whole names, or a regular expression."""
    for targets in ({name.rpartition(".")[2] for name in adapted}, adapted):
        ends = tuple(f".{target}" for target in targets)
        if {name for name in names if name in targets or name.endswith(ends)} == adapted:
            return sorted(targets)
    return "|".join(re.escape(name) for name in sorted(adapted))
