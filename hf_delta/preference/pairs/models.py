"""Which model a name stands for: its files, and what tells it from every other model."""

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_delta.errors import InputError
from hf_delta.evaluation.loading import base_and_adapter
from hf_delta.paths import expanded


# What decides how a model answers. Reports, checkpoints and states of the trainer may come and go beside it.
_FILES = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
)


@dataclass(frozen=True)
class Source:
    """A model to load: where it lies, and what it is."""

    option: str  # such as --strong, for messages
    base: str
    adapter: Path | None
    identity: dict[str, Any]


def locate(name: str | Path, option: str) -> Source:
    """Find a model directory, a PEFT adapter directory that names its base, or a model of the Hub.

    The identity of a directory is the SHA-256 of its weights, configuration and tokenizer, that of a model of the Hub its
    revision, which is downloaded here; an adapter has that of its base besides.

    Raises:
        InputError: if there is none, or it is no model.
    """
    folder, identity = _find(str(name), option)
    try:
        base, adapter = base_and_adapter(folder)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if adapter is None:
        return Source(option, str(folder), None, identity)
    base_folder, base_identity = _find(base, f"{option}: the base model of {name}")
    return Source(option, str(base_folder), adapter, {**identity, "base": base_identity})


def same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of one model, wherever its files lie."""
    return without_paths(one) == without_paths(other)


def without_paths(content: Any) -> Any:
    """A copy of nested dicts without the keys `path`, which say where something lies and not what it is."""
    if not isinstance(content, dict):
        return content
    return {key: without_paths(value) for key, value in content.items() if key != "path"}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(name: str, option: str) -> tuple[Path, dict[str, Any]]:
    folder = expanded(name)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if any(fnmatch(path.name, wanted) for wanted in _FILES))
        if not {"config.json", "adapter_config.json"} & {path.name for path in files}:
            raise InputError(f"{option}: {name} is no model: it holds no config.json and no adapter_config.json.")
        return folder, {"path": name, "sha256": _digest(files)}
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{option}: there is no directory {name}.")
    try:
        snapshot = Path(snapshot_download(name, allow_patterns=[*_FILES, "*.json"], ignore_patterns="*.bin"))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{option}: there is no directory {name}, and the Hub does not give it ({reason})."
        ) from error
    return snapshot, {"hub": name, "revision": snapshot.name}


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()
