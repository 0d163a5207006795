"""A model of which only the shapes exist: from a configuration, with the adapter really applied."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from hf_delta.errors import InputError
from hf_delta.plan.parts import Weights
from hf_delta.recipe.find import shipped


CONFIGS = "configs"

# Values of one scale of bitsandbytes.
_BLOCK, _NESTED_BLOCK = 64, 256


def find_config(name: str, revision: str | None, recipe: Path, trust: bool = False) -> tuple[PretrainedConfig, str]:
    """The configuration of a model, and where it was found.

    A directory, the cache of the Hub, `configs/<org>--<name>.json` beside the recipe or among the shipped ones, the Hub.

    Raises:
        `InputError`: it is nowhere, or cannot be read.
    """
    if Path(name).is_dir():
        return _pretrained(name, revision, trust, local=True), f"{name}/config.json"
    try:
        return _pretrained(name, revision, trust, local=True), "the cache of the Hub"
    except InputError:
        pass
    for folder in (recipe.parent / CONFIGS, recipe.parent.parent / CONFIGS, shipped("recipes") / CONFIGS):
        path = folder / f"{name.replace('/', '--')}.json"
        if path.is_file():
            return _from_file(path), str(path)
    try:
        return _pretrained(name, revision, trust, local=False), "the Hub"
    except InputError as error:
        raise InputError(
            f"{error} For a dry run without network, write its shapes to {recipe.parent / CONFIGS}/"
            f"{name.replace('/', '--')}.json, as in its config.json: model_type, hidden_size, num_hidden_layers, ..."
        ) from error


def _pretrained(name: str, revision: str | None, trust: bool, local: bool) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust, local_files_only=local)
    except (OSError, ValueError) as error:
        where = "has no usable config.json" if Path(name).is_dir() else "is no directory here and no model of the Hub"
        raise InputError(f"model_name_or_path: {name} {where} ({str(error).splitlines()[0]}).") from error


def _from_file(path: Path) -> PretrainedConfig:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "model_type" not in content:
            raise ValueError("it has no model_type")
        return AutoConfig.for_model(**content)
    except Exception as error:
        # Whatever a class of configurations trips over.
        reason = " ".join(str(error).partition(" Should contain one of")[0].split()).rstrip(".")
        raise InputError(f"{path}: no configuration of a model ({reason}).") from error


def shapes_of(config: PretrainedConfig, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The causal language model of a configuration, on the meta device.

    Raises:
        `InputError`: transformers has no causal language model for it.
    """
    # Kernels for GPUs only; they keep what sdpa keeps.
    attention = attention if attention in ("eager", "sdpa") else None
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    except Exception as error:
        # Whatever the class of a model trips over in a configuration.
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise InputError(
            f"model_name_or_path: no causal language model can be built of the configuration ({config.model_type}; "
            f"{type(error).__name__}: {reason})."
        ) from error


def adapt(model: nn.Module, peft: PeftConfig, keep_dtype: bool = False) -> PeftModel:
    """A model on the meta device with the adapter of a recipe.

    Raises:
        `InputError`: `target_modules` names layers that are not there, of a kind that the method cannot adapt, or too small.
    """
    config = copy.deepcopy(peft)
    if isinstance(getattr(config, "init_lora_weights", None), str):
        # Starts that look at the weights; they change values and no shapes.
        config.init_lora_weights = True
    _check_names(model, config)
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=not keep_dtype, low_cpu_mem_usage=True)
    except InputError as error:
        raise InputError(f"peft_config: {error}") from error
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"peft_config: {first} {_there(model)}") from error


def _check_names(model: nn.Module, config: PeftConfig) -> None:
    names = getattr(config, "target_modules", None)
    keys = [name for name, _ in model.named_modules() if name]
    if isinstance(names, str):
        if names != "all-linear" and not any(re.fullmatch(names, key) for key in keys):
            raise InputError(f"peft_config: target_modules: no layer has a name like {names!r}. {_there(model)}")
        return
    for name in sorted(names or ()):
        if not any(key == name or key.endswith(f".{name}") for key in keys):
            raise InputError(f"peft_config: target_modules: there is no layer {name!r} in the model. {_there(model)}")


def _there(model: nn.Module) -> str:
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return f"Its linear layers are {', '.join(sorted(names))}."


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of blocks, the largest of the lists that are as long as the model has layers."""
    wanted = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == wanted > 0]
    if not found:
        raise InputError(f"{model.config.model_type}: its blocks were not found; a plan cannot be made for it.")
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def backbone_of(model: nn.Module) -> nn.Module:
    """The model below PEFT's wrapper, without its head."""
    return plain(model).base_model


def plain(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def quantise(model: nn.Module) -> None:
    """Give trained tensors of an adapter the dtype that TRL gives them on a quantised base."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and "lora_magnitude_vector" not in f"{path}.{name}":
                setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16)))


def weights_of(model: nn.Module, bits: int | None = None, nested: bool = False) -> Weights:
    """Count parameters; frozen linear layers outside of the head have `bits` bits where they are to be quantised."""
    parameters = list(model.parameters())
    head = plain(model).get_output_embeddings()
    packed = {} if bits is None else _packed(model, head, bits, nested)
    frozen = [p for p in parameters if not p.requires_grad]
    trained = [p for p in parameters if p.requires_grad]
    blocks = blocks_of(model)
    embedding = list(plain(model).get_input_embeddings().parameters())
    head_parameters = [] if head is None else list(head.parameters())
    total = sum(p.numel() for p in parameters)
    return Weights(
        all=total,
        trained=sum(p.numel() for p in trained),
        frozen_bytes=sum(packed.get(id(p), p.numel() * p.element_size()) for p in frozen),
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        frozen_values=sum(p.numel() for p in frozen if id(p) not in packed),
        layers=len(blocks),
        layer_values=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        root_values=total - sum(p.numel() for p in blocks.parameters()),
        embedding_values=sum(p.numel() for p in embedding),
        largest_trained=max((p.numel() for p in trained), default=0),
        embedding_trained=any(p.requires_grad for p in embedding),
        head_trained=any(p.requires_grad for p in head_parameters),
        tied=bool({id(p) for p in embedding} & {id(p) for p in head_parameters}),
        packed_bytes=sum(packed.values()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
    )


def saved_bytes(model: nn.Module) -> int:
    """Bytes of what a run writes in the end: the adapter with its frozen tensors, or the model."""
    if isinstance(model, PeftModel):
        return sum(value.nbytes for value in get_peft_model_state_dict(model, save_embedding_layers=False).values())
    return sum(parameter.nbytes for parameter in model.parameters())


def _packed(model: nn.Module, head: nn.Module | None, bits: int, nested: bool) -> dict[int, int]:
    """Bytes of every weight that bitsandbytes packs, with its scales."""
    found = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head or module.weight.requires_grad:
            continue
        values, rows = module.weight.numel(), module.weight.shape[0]
        if bits == 8:
            found[id(module.weight)] = values + 4 * rows
        else:
            scale = 1 + 4 / _NESTED_BLOCK if nested else 4
            found[id(module.weight)] = round(values / 2 + values / _BLOCK * scale)
    return found


def largest_packed(model: nn.Module, width: int = 2) -> int:
    """Bytes of the largest weight that is unpacked for a moment."""
    weights = [m.weight.numel() for m in blocks_of(model).modules() if isinstance(m, nn.Linear)]
    return width * max(weights, default=0)


def shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The configuration with so many blocks."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:layers])
    text.num_hidden_layers = layers
    return short


def cache_values(config: PretrainedConfig) -> int:
    """Values of keys and values that one token has in one block."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * kept * size
