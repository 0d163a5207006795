"""A saved adapter over a base model of which one layer at a time is in memory."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_delta._compat.weights import names_in_model
from hf_delta.adapters.bone.convert import convert_to_bone
from hf_delta.adapters.bone.formats import OLD_BONE
from hf_delta.adapters.export.change import adapted_layers
from hf_delta.adapters.export.quantised import (
    Quantization,
    check_stored_quantization,
    dequantised,
    parts_of_quantised,
    recorded_quantization,
)
from hf_delta.adapters.export.weights import Checkpoint, local_model, read_json
from hf_delta.errors import InputError
from hf_delta.paths import expanded


ADAPTER = "default"


class BaseWeights:
    """Dense values of the weights of a base model, as the adapter saw them in training.

    Attributes:
        names (`dict[str, str]`): The parameter of the model for each tensor of the checkpoint that is one.
    """

    def __init__(
        self, checkpoint: Checkpoint, config: dict[str, Any], model: PreTrainedModel, asked: Quantization | None
    ):
        self.checkpoint = checkpoint
        self.quantization = asked
        self.parts = parts_of_quantised(checkpoint.files) if check_stored_quantization(config, asked) else {}
        self.rounded = asked.quantised_modules(empty_model(checkpoint.folder)) if asked else set()
        self.names = names_in_model(model, checkpoint.files)
        self.tied = _tied_names(model)
        self._keys = {name: key for key, name in self.names.items()}
        self._inner = {part for parts in self.parts.values() for part in parts}
        self._dense_dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))

    def keys(self, shard: str) -> list[str]:
        """The tensors of a file that are weights, and not scales or tables of quantised ones."""
        return [key for key in self.checkpoint.shards[shard] if key not in self._inner]

    def value(self, key: str) -> tuple[torch.Tensor, torch.dtype]:
        """The dense value of a tensor of the checkpoint, and the dtype that it has when the model is loaded."""
        stored = self.checkpoint.read(key)
        if self.quantization and self.names.get(key, key).removesuffix(".weight") in self.rounded and stored.ndim == 2:
            return self.quantization.round_trip(stored), stored.dtype
        if key in self.parts:
            parts = {part: self.checkpoint.read(part) for part in self.parts[key]}
            return dequantised(key, stored, parts), self._dense_dtype
        return stored, stored.dtype

    def key(self, name: str) -> str:
        """The tensor of the checkpoint that has a parameter of the model, maybe by a name that is tied to this one.

        Raises:
            `InputError`: there is none.
        """
        for alias in (name, *self.tied.get(name, ())):
            if alias in self._keys:
                return self._keys[alias]
        raise InputError(
            f"{self.checkpoint.folder} has no weight for {name}. If it stores it under another name or as a part of a larger "
            "one, load the model with transformers and save it again."
        )


class SavedAdapter:
    """An adapter from its directory, in float32, over a model without weights.

    Attributes:
        config (`PeftConfig`): Of the adapter, as it was saved.
        model (`PeftModel`): With the adapter, and with parameters of the base model that take no memory.
        layers (`dict[str, BaseTunerLayer]`): By their names in the base model.
        module_names (`list[str]`): All modules of the base model.
        parameter_names (`set[str]`): All its parameters.
        weights ([`BaseWeights`]): Of the base model.
    """

    def __init__(
        self,
        adapter: str | Path,
        base: str | Path | None = None,
        quantization: Quantization | None = None,
        check: Callable[[PeftConfig], None] = lambda config: None,
    ):
        """
        Raises:
            `InputError`: something is missing, broken, pickled, or does not belong together, or `check` refuses the
                configuration of the adapter.
        """
        self.folder = expanded(adapter)
        self.config, tensors = read_adapter(self.folder)
        check(self.config)
        if not isinstance(base or self.config.base_model_name_or_path or None, (str, Path)):
            raise InputError(f"{self.folder} does not say what its base model is: name it with --base.")
        own = {"name": self.config.base_model_name_or_path, "revision": self.config.revision}
        self.base_folder = local_model(base) if base else local_model(**own)
        self.config.base_model_name_or_path = own["name"] or str(base)
        self.base_config = read_json(self.base_folder / "config.json")
        model = empty_model(self.base_folder)
        # By their identity; kept alive, so that nothing else can have it.
        self._empty = {id(parameter): parameter for parameter in model.parameters()}
        self.module_names = [name for name, _ in model.named_modules() if name]
        if quantization is None and "quantization_config" not in self.base_config:
            quantization = Quantization(**recorded_quantization(self.folder))
        self.parameter_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        checkpoint = Checkpoint(self.base_folder)
        self.weights = BaseWeights(checkpoint, self.base_config, model, quantization)
        self.model = _with_adapter(model, self.config, tensors, self.base_folder)
        self.layers = adapted_layers(self.model, ADAPTER)

    def is_empty(self, parameter: nn.Parameter) -> bool:
        """Whether a parameter of the model stands for one of the base model and has no values."""
        return id(parameter) in self._empty

    @contextmanager
    def loaded(self, name: str) -> Iterator[None]:
        """Context in which one layer has the parameters of the base model, in float32."""
        layer = self.layers[name].get_base_layer()
        empty = {key: p for key, p in layer.named_parameters(recurse=False) if self.is_empty(p)}
        for key, parameter in empty.items():
            value, _ = self.weights.value(self.weights.key(f"{name}.{key}"))
            if value.shape != parameter.shape:
                raise InputError(
                    f"{name}.{key} is {tuple(value.shape)} in the checkpoint and {tuple(parameter.shape)} in the model."
                )
            setattr(layer, key, nn.Parameter(value.float(), requires_grad=False))
        try:
            yield
        finally:
            for key, parameter in empty.items():
                setattr(layer, key, parameter)


def read_adapter(folder: Path) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of a saved adapter, floating point ones in float32.

    Raises:
        `InputError`: something is missing, unreadable, pickled, or not finite.
    """
    if not (folder / "adapter_config.json").is_file():
        said = "holds no adapter_config.json" if folder.is_dir() else "is no directory"
        raise InputError(f"adapter: {folder} {said}; give the directory that save_pretrained or a trainer wrote.")
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind == OLD_BONE:
        with TemporaryDirectory() as converted:
            return read_adapter(convert_to_bone(folder, Path(converted) / "bone"))
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{folder / 'adapter_config.json'}: neither PEFT nor hf_delta knows the method {kind!r}.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise InputError(f"{folder / 'adapter_config.json'}: {error}") from error
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder} holds pickled weights, which are not read: load the adapter with PEFT where you trust it, and save it "
                "again."
            )
        raise InputError(f"{folder} holds no adapter_model.safetensors.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is cut short or damaged.") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {name} holds NaN or infinite values: the file is broken, or training diverged.")
    return config, {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def empty_model(folder: Path) -> PreTrainedModel:
    """The model of a directory, of the class that wrote it, without weights. Runs no code of the directory.

    Each parameter is one zero, seen in the shape of the parameter: PEFT takes it for a model on the CPU, where it is to put
    the adapter, and it takes no memory.

    Raises:
        `InputError`: transformers does not know the architecture.
    """
    made: dict[int, nn.Parameter] = {}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        wanted = (getattr(config, "architectures", None) or [""])[0]
        with torch.device("meta"):
            cls = getattr(transformers, wanted, None)
            model = AutoModelForCausalLM.from_config(config) if cls is None else cls(config)
    except Exception as error:
        # Whatever the class of a model trips over in a configuration.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{folder / 'config.json'} describes no model that transformers can build ({type(error).__name__}: {reason})."
        ) from error
    model.tie_weights()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            setattr(module, name, made.setdefault(id(parameter), empty))
    return model.eval()


def _with_adapter(
    model: PreTrainedModel, config: PeftConfig, tensors: dict[str, torch.Tensor], base: Path
) -> PeftModel:
    another = f"The adapter was made for another base model than {base}, or its file is damaged"
    own = copy.deepcopy(config)
    own.inference_mode = True
    try:
        # PEFT warns of what training and merging in memory have to mind, tied weights for one.
        with warnings.catch_warnings(action="ignore"):
            wrapped = get_peft_model(model, own, adapter_name=ADAPTER, low_cpu_mem_usage=True)
            result = set_peft_model_state_dict(wrapped, tensors, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    except InputError:
        raise
    except Exception as error:
        # Whatever a method of PEFT trips over in a configuration.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise InputError(f"{another} ({reason.rstrip('.')}).") from error
    if result.unexpected_keys:
        raise InputError(f"{another}: the model has no place for {result.unexpected_keys[0]}.")
    for name, layer in adapted_layers(wrapped, ADAPTER).items():
        for part in layer.adapter_layer_names:
            held = getattr(layer, part, None)
            if isinstance(held, nn.Module) and any(t.is_meta for t in held.state_dict().values()):
                raise InputError(f"{another}: it has no {part} for {name}.")
    return wrapped


def _tied_names(model: PreTrainedModel) -> dict[str, list[str]]:
    """The other names of each parameter that has more than one."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return {
        name: [other for other in names if other != name]
        for names in groups.values()
        if len(names) > 1
        for name in names
    }
