"""The weights of a base model on disk, one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from hf_delta.errors import InputError
from hf_delta.paths import expanded


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def local_model(name: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: this one, or the snapshot of a model of the Hub.

    Raises:
        `InputError`: there is neither.
    """
    path = expanded(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"base model: {path} holds no config.json, so it is no model.")
        return path
    if path.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise InputError(f"base model: there is no directory {name}; say where it is with --base.")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=_WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"base model: {name} is no directory, and the Hub does not give it ({reason}).") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        `InputError`: there is no such file, or it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object.")
    return content


class Checkpoint:
    """Safetensors files of one model, of which a tensor at a time is read.

    Attributes:
        files (`dict[str, str]`): The file of each tensor.
        shards (`dict[str, list[str]]`): The tensors of each file, in their order.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            `InputError`: the directory holds no safetensors weights, or not all that its index names.
        """
        self.folder = folder
        if (folder / INDEX).is_file():
            names = read_json(folder / INDEX).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
                raise InputError(f"{folder / INDEX} is damaged: its weight_map does not name a file for each tensor.")
            shards = sorted(set(names.values()))
        elif (folder / SINGLE).is_file():
            names, shards = None, [SINGLE]
        else:
            raise InputError(
                f"{folder} holds no {SINGLE} and no {INDEX}. Pickled weights are not read: load the model with transformers "
                "and save it again, save_pretrained writes safetensors."
            )
        self.shards = {shard: self._names(shard) for shard in shards}
        self.files = {key: shard for shard, keys in self.shards.items() for key in keys}
        if missing := set(names or {}) - set(self.files):
            raise InputError(f"{folder / INDEX} names {min(missing)}, which is in none of its files.")

    def read(self, key: str) -> torch.Tensor:
        """One tensor, as it is stored."""
        # Opened anew each time, so that no more than this tensor stays mapped into memory.
        with safe_open(self.folder / self.files[key], framework="pt") as file:
            return file.get_tensor(key)

    def _names(self, shard: str) -> list[str]:
        try:
            with safe_open(self.folder / shard, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.folder / shard} cannot be read ({error}): it is missing or cut short.") from error
