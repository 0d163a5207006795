"""The weights of a model with its adapters in them, one module at a time, for whoever keeps a copy of the whole."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from hf_delta._compat.bitsandbytes import dequantised_weight, is_bitsandbytes
from hf_delta._compat.twins import make_dense, twin
from hf_delta.adapters.base import DeltaLinear
from hf_delta.adapters.mergeable import kind_of, layers_to_merge, obstacle_to_streaming
from hf_delta.errors import InputError
from hf_delta.ops.gather import full_tensor, gathered, is_partitioned


Weights = Iterator[tuple[str, torch.Tensor]]


def has_adapters(model: nn.Module) -> bool:
    """Whether the model is another one with an adapter, of weights or of something else."""
    kinds = (PeftModel, BaseTunerLayer, ModulesToSaveWrapper, TrainableTokensWrapper)
    return any(isinstance(module, kinds) for module in model.modules())


def check_streamable(model: nn.Module) -> None:
    """
    Raises:
        `InputError`: [`merged_weights`] cannot give the weights of this model, or not under the names of its base model.
    """
    reason = obstacle_to_streaming(model, layers_to_merge(model))
    if reason is not None:
        raise InputError(f"The weights with the adapter in them cannot be computed, as vLLM needs them: {reason}.")
    _check_ties(_base_of(model))


def merged_weights(model: nn.Module, device: torch.device | None = None) -> Weights:
    """
    Names and whole tensors of the base model's parameters, with the active adapters in them; the model stays as it is.

    `W' = W + ΔW` by the adapter's own merge, on a twin of its layer whose weights are gathered copies: bit for bit what
    `merge_adapter` makes of the same model in one piece. Names, and their order, are those of the base model's
    `named_parameters()`, tied weights once. Modules that are trained whole come as the active adapter has them; weights of
    bitsandbytes come dense. Beyond the model, one module is in memory at a time.

    Collective where weights are sharded (FSDP2, tensor parallel, ZeRO-3): every rank iterates to the end.

    Args:
        model: a PEFT model, or one that contains PEFT layers.
        device (`torch.device`, *optional*): where sharded weights that are offloaded to a CPU are gathered.

    Raises:
        `InputError`: there is no such tensor (see [`check_streamable`]; a layer does not merge), or it has NaN or infinite
            values.
    """
    check_streamable(model)
    given: set[int] = set()
    for part in _parts(_base_of(model)):
        wanted = [name for name, original in part.originals.items() if id(original) not in given]
        given.update(map(id, part.originals.values()))
        if wanted:
            yield from _values(part, wanted, partial(_whole, device=device))


# -- where weights come from ---------------------------------------------------------------------------------------------
@dataclass
class _Part:
    """A module with parameters of its own, or an adapted layer.

    Attributes:
        path (`str`): of the module in the base model.
        module (`nn.Module`): what computes in its place: a tuner layer, a module that is trained whole, or itself.
        originals (`dict[str, nn.Parameter]`): the base model's parameters in this place.
    """

    path: str
    module: nn.Module
    originals: dict[str, nn.Parameter]

    @property
    def is_adapted(self) -> bool:
        return isinstance(self.module, BaseTunerLayer)

    def name_of(self, parameter: str) -> str:
        name = f"{self.path}.{parameter}" if self.path else parameter
        # Of torch's activation checkpointing, which the engine's model does not have.
        return name.replace("_checkpoint_wrapped_module.", "")

    def source_of(self, parameter: str) -> int:
        """Equal for weights that are the same one, also with adapters."""
        if self.is_adapted:
            return id(getattr(self.module, "tied_adapter", None) or self.module)
        return id(self.module.get_parameter(parameter))


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _parts(
    module: nn.Module, original: nn.Module | None = None, path: str = "", seen: set[nn.Module] | None = None
) -> Iterator[_Part]:
    """All parts in the order of `named_parameters()` of the base model."""
    seen = set() if seen is None else seen
    module, original = _in_use(module, original or module)
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, BaseTunerLayer):
        yield _Part(path, module, dict(original.named_parameters()))
        return
    yield _Part(path, module, dict(original.named_parameters(recurse=False)))
    before = dict(original.named_children())
    for name, child in module.named_children():
        yield from _parts(child, before.get(name), f"{path}.{name}" if path else name, seen)


def _in_use(module: nn.Module, original: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What computes in the place of a module, and what did in the base model."""
    while True:
        if isinstance(original, (ModulesToSaveWrapper, TrainableTokensWrapper)):
            original = original.original_module
        elif isinstance(original, BaseTunerLayer):
            original = original.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            module = (
                module.original_module if module.disable_adapters or not active else module.modules_to_save[active[0]]
            )
        elif isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif isinstance(module, BaseTunerLayer) and not layers_to_merge(module):
            module = module.get_base_layer()
        else:
            return module, original


def _check_ties(root: nn.Module) -> None:
    """
    Raises:
        `InputError`: one parameter of the base model is several with the adapter.
    """
    places: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for part in _parts(root):
        for name, original in part.originals.items():
            places[id(original)].append((part.name_of(name), part.source_of(name)))
    for found in places.values():
        if len({source for _, source in found}) > 1:
            names = " and ".join(name for name, _ in found)
            raise InputError(
                f"{names} are one weight in the base model, and differ with the adapter. vLLM ties them too and has room for "
                "one: leave these modules out of the adapter, or train a copy of the model that does not tie them "
                "(tie_word_embeddings: false)."
            )


# -- values --------------------------------------------------------------------------------------------------------------
Whole = Callable[[torch.Tensor], torch.Tensor]


def _values(part: _Part, wanted: list[str], whole: Whole) -> Weights:
    # Nothing that was given out is held here while the next is made.
    if part.is_adapted:
        merged = _merged(part, whole)
        for name in wanted:
            yield part.name_of(name), merged.pop(name)
    else:
        for name in wanted:
            yield part.name_of(name), _unadapted(part.module, name, whole)


@torch.no_grad()
def _unadapted(module: nn.Module, name: str, whole: Whole) -> torch.Tensor:
    if name == "weight" and is_bitsandbytes(module):
        return _dequantised(module)
    parameter = module.get_parameter(name)
    with gathered(parameter):
        # DeepSpeed takes the memory back, and who gets the tensor may keep it for a while.
        return _owned(parameter, whole) if is_partitioned(parameter) else whole(parameter)


@torch.no_grad()
def _merged(part: _Part, whole: Whole) -> dict[str, torch.Tensor]:
    """The parameters of the base layer with the active adapters in them."""
    layer, base = part.module, part.module.get_base_layer()
    with gathered(*layer.parameters()):
        dense = {base: _dense(base)} if is_bitsandbytes(base) else {}
        # Ours put another weight in the place of theirs; PEFT's write to it.
        owned = set() if isinstance(layer, DeltaLinear) else {id(parameter) for parameter in base.parameters()}
        copy = twin(layer, lambda p: _frozen(_owned(p, whole) if id(p) in owned else whole(p)), dense)
        if dense:
            make_dense(copy)
        for each in layers_to_merge(copy).values():
            _merge(each, f"{part.path} ({kind_of(each)})")
        merged = {name: parameter.detach() for name, parameter in copy.get_base_layer().named_parameters()}
        # What was not changed may be the model's own, and DeepSpeed takes that back.
        if any(map(is_partitioned, base.parameters())):
            merged = {name: tensor.clone() for name, tensor in merged.items()}
    for name, tensor in merged.items():
        # NaN passes through both, and nothing of the size of the weight is allocated.
        if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise InputError(
                f"{part.name_of(name)} has NaN or infinite values once its adapter is merged: training diverged, or the "
                "adapter came from a broken file; go back to an earlier checkpoint."
            )
    return merged


def _merge(layer: BaseTunerLayer, where: str) -> None:
    try:
        layer.merge()
    except (InputError, torch.OutOfMemoryError):
        raise
    # Every method refuses in its own way.
    except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{where} cannot be merged, as vLLM needs it: {error or type(error).__name__}") from error
    if not layer.merged:
        raise InputError(f"{where} does not merge, as vLLM needs it.")


def _whole(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    if isinstance(tensor, DTensor) and device is not None and tensor.device.type != device.type:
        tensor = tensor.detach().to(device)
    return full_tensor(tensor)


def _owned(parameter: nn.Parameter, whole: Whole) -> torch.Tensor:
    """A whole tensor that no one else has, to be written to."""
    tensor = whole(parameter)
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    is_shared = tensor.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
    return tensor.clone() if is_shared else tensor


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _dequantised(layer: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return dequantised_weight(layer).detach()


def _dense(layer: nn.Module) -> nn.Linear:
    weight = _dequantised(layer)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = _frozen(weight)
    if layer.bias is not None:
        dense.bias = _frozen(layer.bias.detach().clone())
    return dense
