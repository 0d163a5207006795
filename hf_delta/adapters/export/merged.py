"""An adapter merged into a copy of its base model, file by file."""

import copy
import json
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from tqdm import tqdm

from hf_delta.adapters.export.change import merged_parameters
from hf_delta.adapters.export.disk import ADAPTER, SavedAdapter
from hf_delta.adapters.export.files import check_new, new_directory
from hf_delta.adapters.export.limits import check_weight_change
from hf_delta.adapters.export.quantised import Quantization
from hf_delta.adapters.export.weights import INDEX, SINGLE
from hf_delta.errors import InputError


# What is copied from the base model; the tokenizer from the adapter where it has its own.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "*.model",
    "*.tiktoken",
)
_OTHERS = ("generation_config.json", "*processor_config.json", "chat_template.json", "LICENSE*")


def export_merged(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    progress: bool = False,
) -> Path:
    """Write the base model with the adapter merged into it, in files like those of the base model.

    One file is in memory at a time, and of one adapted module the weights before and after, in float32. A base model that
    was quantised for training comes out dense, with the values that the adapter was trained on.

    Args:
        adapter (`str` or `Path`): Directory of the adapter.
        out (`str` or `Path`): Directory to write; new, or empty.
        base (`str` or `Path`, *optional*): The base model; by default the one that the adapter names.
        dtype (`torch.dtype`, *optional*): Of all floating point weights; by default each keeps the one it has.
        quantization ([`Quantization`], *optional*): How the base model was loaded for training; by default what `run.json`
            beside the adapter says.
        progress (`bool`, *optional*, defaults to `False`): Whether to show a bar over the tensors.

    Raises:
        `InputError`: an input is missing, broken or does not fit, or there is something in `out`. Nothing was written.
    """
    check_new(out)
    saved = SavedAdapter(adapter, base, quantization, check_mergeable)
    with new_directory(out) as folder:
        merged = _MergedModel(saved, dtype)
        merged.write(folder, progress)
        _write_config(saved, folder, dtype, merged.untied)
        _copy_other_files(saved, folder)
    return Path(out)


def check_mergeable(config: PeftConfig) -> None:
    """
    Raises:
        `InputError`: the adapter is no change of weights, or of weights that the files hold in another form.
    """
    check_weight_change(config)
    for field in ("target_parameters", "trainable_token_indices"):
        if getattr(config, field, None):
            raise InputError(
                f"{field} cannot be merged file by file: load the model with PEFT, and call merge_and_unload and save_pretrained."
            )


class _MergedModel:
    """The merged weights, computed when they are asked for."""

    def __init__(self, saved: SavedAdapter, dtype: torch.dtype | None):
        self.saved, self.weights, self.dtype = saved, saved.weights, dtype
        lora_bias = getattr(saved.config, "lora_bias", False)
        self.changed = {
            f"{name}.{key}": name
            for name, layer in saved.layers.items()
            for key, _ in layer.get_base_layer().named_parameters(recurse=False)
            if key == "weight" or lora_bias
        }
        self.whole = {name: tensor for name, tensor in _trained_whole(saved).items() if name not in self.changed}
        touched = {*self.changed, *self.whole}
        for name in touched:
            self.weights.key(name)
        self.untied = any(name in self.weights.tied for name in touched)
        self.stored = set(self.weights.names.values())

    def write(self, folder: Path, progress: bool) -> None:
        """Write the files and, where the base model has one, their index."""
        shards = {shard: self.weights.keys(shard) for shard in self.weights.checkpoint.shards}
        total, names = 0, {}
        with tqdm(total=sum(map(len, shards.values())), desc="Merge", unit="tensor", disable=not progress) as bar:
            for shard, keys in shards.items():
                tensors = {}
                for key in keys:
                    tensors |= self._tensors(key)
                    bar.update()
                save_file(tensors, folder / shard, metadata={"format": "pt"})
                total += sum(tensor.nbytes for tensor in tensors.values())
                names |= dict.fromkeys(tensors, shard)
        if list(shards) != [SINGLE]:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _tensors(self, key: str) -> dict[str, torch.Tensor]:
        """What takes the place of one tensor: itself, merged or not, and what was tied to it and no longer is."""
        name = self.weights.names.get(key, key)
        made = {key: self._value(name, key)}
        if self.untied:
            aliases = [alias for alias in self.weights.tied.get(name, ()) if alias not in self.stored]
            made |= {alias: self._value(alias, key) for alias in aliases}
        # Safetensors takes no two names for one memory.
        return made if len(made) == 1 else {key: tensor.clone() for key, tensor in made.items()}

    def _value(self, name: str, key: str) -> torch.Tensor:
        value, dtype = self.weights.value(key)
        if name in self.whole:
            value = _checked(name, self.whole[name], value)
        elif name in self.changed:
            layer = self.changed[name]
            try:
                with self.saved.loaded(layer), torch.no_grad():
                    merged = merged_parameters(self.saved.layers[layer], ADAPTER)[name.removeprefix(f"{layer}.")]
            except InputError as error:
                raise InputError(f"{layer}: {error}") from error
            value = _checked(name, merged, value)
        wanted = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
        return value.to(wanted).contiguous()


def _checked(name: str, tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    if tensor.shape != before.shape:
        raise InputError(
            f"{name} is {tuple(tensor.shape)} with the adapter and {tuple(before.shape)} in the base model: the adapter was made "
            "for another base model, or for another vocabulary."
        )
    if not torch.isfinite(tensor).all():
        raise InputError(
            f"{name} has NaN or infinite values once it is merged: the adapter or the base model is broken."
        )
    return tensor


def _trained_whole(saved: SavedAdapter) -> dict[str, torch.Tensor]:
    """Parameters that the adapter holds whole: trained biases, and the modules in `modules_to_save`."""
    found = {}
    root = saved.model.get_base_model()
    for name, module in root.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and ADAPTER in module.modules_to_save:
            held = module.modules_to_save[ADAPTER]
            found |= {f"{name}.{key}": parameter.detach() for key, parameter in held.named_parameters()}
    for name, parameter in root.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in saved.parameter_names and not saved.is_empty(parameter):
            found[plain] = parameter.detach()
    return found


def _write_config(saved: SavedAdapter, folder: Path, dtype: torch.dtype | None, untied: bool) -> None:
    config = copy.deepcopy(saved.base_config)
    config.pop("quantization_config", None)
    # Models of several parts have a block for each.
    blocks = [config, *(value for value in config.values() if isinstance(value, dict))]
    if dtype is not None:
        config.setdefault("dtype", None)
        for block in blocks:
            block |= {key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in block}
    if untied:
        config["tie_word_embeddings"] = False
        for block in blocks:
            block |= {key: False for key in ("tie_word_embeddings",) if key in block}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_other_files(saved: SavedAdapter, folder: Path) -> None:
    """Tokenizer with its chat template, generation settings and the like."""
    tokenizer = saved.folder if any(saved.folder.glob("tokenizer*")) else saved.base_folder
    sources = [(tokenizer, pattern) for pattern in _TOKENIZER] + [(saved.base_folder, pattern) for pattern in _OTHERS]
    for source, pattern in sources:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
