"""Is there a whole model in a directory? Asked of its files, before its weights are loaded."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from transformers import PreTrainedConfig

from hf_delta._compat.weights import names_in_model
from hf_delta.adapters.export.disk import empty_model
from hf_delta.adapters.export.weights import Checkpoint
from hf_delta.errors import InputError


_KEY = "model_name_or_path"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def check_model_files(folder: Path, config: PreTrainedConfig) -> None:
    """
    Raises:
        `InputError`: the directory has no tokenizer or not all weights, they have other shapes than `config.json` says, or
            the architecture does not continue texts.
    """
    kind = getattr(config, "model_type", None)
    cls = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if getattr(config, "is_encoder_decoder", False) or (hasattr(cls, "can_generate") and not cls.can_generate()):
        raise InputError(f"{_KEY}: {folder} is a {kind}, which does not continue texts. Take a causal language model.")
    if not _has(folder, *_TOKENIZERS):
        raise InputError(
            f"{_KEY}: {folder} has no tokenizer. Save it there: tokenizer.save_pretrained({str(folder)!r})."
        )
    if not _has(folder, "*.safetensors", "*.safetensors.index.json"):
        if not _has(folder, "*.bin"):
            raise InputError(
                f"{_KEY}: {folder} has no weights, neither model.safetensors nor an index of several files."
            )
        return
    if getattr(config, "quantization_config", None) is None:
        _check_weights(folder)


def _has(folder: Path, *patterns: str) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _check_weights(folder: Path) -> None:
    """Weights that are missing are drawn at random by transformers, with a warning among many."""
    checkpoint, model = Checkpoint(folder), empty_model(folder)
    names = names_in_model(model, checkpoint.files)
    here = dict(model.named_parameters(remove_duplicate=False))
    for shard, keys in checkpoint.shards.items():
        with safe_open(folder / shard, framework="pt") as file:
            for key in keys:
                there, parameter = tuple(file.get_slice(key).get_shape()), here.get(names.get(key, key))
                if parameter is not None and there != tuple(parameter.shape):
                    raise InputError(
                        f"{_KEY}: {folder / shard} has {key} of shape {list(there)}, and config.json says {list(parameter.shape)}: "
                        "they are not of one model."
                    )
    missing = _missing(here, set(names.values())) if len(names) == len(checkpoint.files) else []
    if missing:
        raise InputError(
            f"{_KEY}: the weights in {folder} lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ", which would be drawn at random. Save or download the model again."
        )


def _missing(here: dict[str, Any], there: set[str]) -> list[str]:
    """Parameters that are there under none of their names; those that are tied have several."""
    names: dict[int, set[str]] = defaultdict(set)
    for name, parameter in here.items():
        names[id(parameter)].add(name)
    return sorted(name for name, parameter in here.items() if not names[id(parameter)] & there)
