"""Is there a whole model in a directory? Asked of its files, before its weights are loaded."""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from hf_delta._compat.weights import names_in_model
from hf_delta.adapters.export.disk import empty_model
from hf_delta.adapters.export.weights import Checkpoint
from hf_delta.errors import InputError


_KEY = "model_name_or_path"
_PICKLED = "pytorch_model.bin"
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def check_model_files(folder: Path, config: PreTrainedConfig) -> None:
    """
    Raises:
        `InputError`: the directory has no tokenizer or not all weights, they have other shapes than `config.json` says, or
            the architecture does not continue texts, or a file is damaged.
    """
    kind = getattr(config, "model_type", None)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    cls = getattr(transformers, architecture, None)
    if architecture and cls is None:
        raise InputError(
            f"{_KEY}: {folder / 'config.json'} names the architecture {architecture!r}, which this transformers does not have."
        )
    if getattr(config, "is_encoder_decoder", False) or (hasattr(cls, "can_generate") and not cls.can_generate()):
        raise InputError(f"{_KEY}: {folder} is a {kind}, which does not continue texts. Take a causal language model.")
    if not _has(folder, *_TOKENIZERS):
        raise InputError(
            f"{_KEY}: {folder} has no tokenizer. Save it there: tokenizer.save_pretrained({str(folder)!r})."
        )
    _check_tokenizer(folder)
    _check_generation(folder)
    if getattr(config, "quantization_config", None) is not None:
        return
    if _has(folder, "*.safetensors", "*.safetensors.index.json"):
        _check_weights(folder)
    elif (folder / _PICKLED).is_file():
        _check_pickled(folder)
    elif not _has(folder, "*.bin"):
        raise InputError(f"{_KEY}: {folder} has no weights, neither model.safetensors nor an index of several files.")


def _check_tokenizer(folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer("a")
    except Exception as error:
        # Whatever classes of tokenizers trip over.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"{_KEY}: the tokenizer in {folder} cannot be loaded ({reason}). Save or download it again."
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{_KEY}: the tokenizer in {folder} has no eos_token, so that no text would end. Write it into tokenizer_config.json."
        )


def _has(folder: Path, *patterns: str) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _check_generation(folder: Path) -> None:
    """What is no JSON is left out by transformers, and what is no object is not."""
    try:
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder)
    except OSError:
        return
    except Exception as error:
        raise InputError(
            f"{_KEY}: {folder / 'generation_config.json'} is damaged ({error}). Delete it, or save the model again."
        ) from error


def _check_weights(folder: Path) -> None:
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
    if len(names) == len(checkpoint.files):
        _check_all_there(folder, here, set(names.values()))


def _check_pickled(folder: Path) -> None:
    try:
        names = set(torch.load(folder / _PICKLED, map_location="meta", weights_only=True).keys())
    except Exception as error:
        # Whatever reading bytes that are no pickle raises.
        raise InputError(
            f"{_KEY}: {folder / _PICKLED} holds no weights that torch.save wrote: it is cut short, or something else. Save or "
            "download the model again."
        ) from error
    model = empty_model(folder)
    _check_all_there(
        folder, dict(model.named_parameters(remove_duplicate=False)), names_in_model(model, names).values()
    )


def _check_all_there(folder: Path, here: dict[str, Any], there: Collection[str]) -> None:
    """Weights that are missing are drawn at random by transformers, with a warning among many."""
    missing = _missing(here, set(there))
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
