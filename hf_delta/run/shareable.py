"""Which files of a result are for others, and what must not stand in them."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, get_token
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_delta.errors import InputError
from hf_delta.plot.figure import CURVES
from hf_delta.run.card import Names, card_of, local_card
from hf_delta.run.directory import MANIFEST
from hf_delta.run.result import Result


Files = dict[str, Path | bytes]  # by path in the repository: a file as it is, or what takes its place

_ADAPTER = ("adapter_model*.safetensors", "adapter_model.safetensors.index.json")
_MODEL = ("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "LICENSE*")
_TOKENIZER = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "*processor_config.json",
)
# Rewritten where they name this disk: configurations, and not the vocabulary.
_CONFIGURATIONS = re.compile(r"(generation_|tokenizer_|.*processor_)?config\.json")

_OF_THIS_DISK = ("local_paths", "output_dir")
_TRAINING_ONLY = (
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "push_to_hub",
    "logging_dir",
    "log_level",
)
_FILES = ("train_file", "eval_file", "playground")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_HEADER = 1 << 20  # bytes of a file of weights in which text can stand, at most


def shareable(result: Result, repo: str, base: str | None, lora_error: float | None = None) -> Files:
    """Every file of a result that goes to the Hub, with names of the Hub instead of local paths.

    Weights, configuration, tokenizer, `curves.png`, `run.json` without what concerns this disk, and the card. Nothing else
    of the directory is looked at: checkpoints, optimizer and random states, `training_args.bin`, logs, completions and the
    evaluation's problems stay here.

    Args:
        result ([`Result`]): What is to be shared.
        repo (`str`): Id of the repository.
        base (`str`, *optional*): Id of the base model.
        lora_error (`float`, *optional*): Largest relative error of a LoRA copy that goes with it.
    """
    folder, found = result.folder, {}
    patterns = (*(_MODEL if result.adapter is None else _ADAPTER), *_TOKENIZER, CURVES)
    if _has_own_code(folder):
        patterns += ("*.py",)
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file()):
        found[path.relative_to(folder).as_posix()] = _plain(path, result, repo, base)
    if result.adapter is not None:
        found["adapter_config.json"] = as_json(adapter_config(result.adapter, base))
    if result.manifest:
        found[MANIFEST] = as_json(shared_manifest(result, base))
    names = Names(repo, base, shown_values(result, base), lora_error, picture=CURVES in found)
    found["README.md"] = shared_card(result, names).encode()
    return found


def adapter_config(config: dict[str, Any], base: str | None) -> dict[str, Any]:
    """`adapter_config.json` with the id of the base model; fields that hold another local path get their default."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(config.get("peft_type"))
    defaults = {} if cls is None else {field.name: field.default for field in dataclasses.fields(cls)}
    shared = {**config, "base_model_name_or_path": base}
    for key, value in shared.items():
        if isinstance(value, str) and key != "base_model_name_or_path" and Path(value).is_absolute():
            default = defaults.get(key)
            shared[key] = None if default is dataclasses.MISSING else default
    return shared


def shown_values(result: Result, base: str | None) -> dict[str, Any]:
    """The recipe's keys with files by their names alone, without those that concern this disk or the upload."""
    local = set(result.manifest.get("local_paths", []))
    shown = {}
    for key, value in result.values.items():
        if key in _TRAINING_ONLY or key.startswith("hub_") or key in ("base_model_id", "push_lora"):
            continue
        if key == "model_name_or_path":
            shown[key] = base if base is not None else _name(value)
        elif key in _FILES:
            shown[key] = [_name(one) for one in value] if isinstance(value, list) else _name(value)
        else:
            shown[key] = _without_paths(value, local)
    return shown


def _without_paths(value: Any, local: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item, local) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, local) for item in value]
    looks_local = isinstance(value, str) and (value in local or re.match(r"(~|\.\.?)?/.", value))
    return _name(value) if looks_local else value


def _name(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) else value


def shared_manifest(result: Result, base: str | None) -> dict[str, Any]:
    """`run.json` without local paths; `hf-delta export` finds in it how the base model was quantised."""
    manifest = {key: value for key, value in result.manifest.items() if key not in _OF_THIS_DISK}
    local = set(result.manifest.get("local_paths", []))
    method = _without_paths(manifest["method"], local)
    if base is not None:
        method["model_name_or_path"] = base
    manifest |= {"recipe": _name(manifest.get("recipe")), "resumed_from": _name(manifest.get("resumed_from"))}
    return {**manifest, "values": shown_values(result, base), "method": method}


def shared_card(result: Result, names: Names) -> str:
    """The card under the names of the Hub; a card that somebody has edited is kept, with its names replaced."""
    path = result.folder / "README.md"
    own = path.read_text(encoding="utf-8") if path.is_file() else ""
    ours = [str(local_card(result, folder)) for folder in (None, result.manifest.get("output_dir"))]
    if not own.strip() or "[More Information Needed]" in own or own in ours:
        return str(card_of(result, names))
    card = ModelCard(_renamed(own, result, names.result, names.base))
    if names.base is not None:
        card.data.base_model = names.base
    return str(card)


def _plain(path: Path, result: Result, repo: str, base: str | None) -> Path | bytes:
    """A file as it is, or its text if that names this disk."""
    if not _CONFIGURATIONS.fullmatch(path.name):
        return path
    text = path.read_text(encoding="utf-8")
    renamed = _renamed(text, result, repo, base)
    return path if renamed == text else renamed.encode()


def _renamed(text: str, result: Result, repo: str, base: str | None) -> str:
    known = {path: Path(path).name for path in result.manifest.get("local_paths", [])}
    known |= {folder: repo for folder in (str(result.folder.resolve()), result.manifest.get("output_dir")) if folder}
    if base is not None and result.base_is_local:
        known |= {name: base for name in (result.base, os.path.abspath(result.base)) if len(name) > 1}
    for name in sorted(known, key=len, reverse=True):
        text = re.sub(rf"{re.escape(name)}(?![\w-])", known[name], text)
    return text


def _has_own_code(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and '"auto_map"' in config.read_text(encoding="utf-8")


def as_json(content: dict[str, Any]) -> bytes:
    """A JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def check_nothing_private(files: Files, result: Result, token: str | None = None) -> None:
    """The last look at what is about to leave.

    Raises:
        `InputError`: a file holds a token, or a path of this disk.
    """
    secrets = [secret for secret in (token, get_token()) if secret]
    paths = _private_paths(result)
    for name, content in files.items():
        data = _text_of(content)
        if any(secret.encode() in data for secret in secrets) or (
            not name.endswith((".safetensors", ".png")) and _TOKEN.search(data)
        ):
            raise InputError(f"{name} holds a token of the Hub: take it out. Nothing was pushed.")
        for path in paths:
            if path.encode() in data or json.dumps(path)[1:-1].encode() in data:
                raise InputError(
                    f"{result.folder / name} holds the local path {path}: take it out, or write a name of the Hub. Nothing was "
                    "pushed."
                )


def _private_paths(result: Result) -> list[str]:
    """Absolute paths that say something about this disk: long enough that no other text holds them by chance."""
    values = [result.values.get(key) for key in _FILES]
    named = [one for value in values for one in (value if isinstance(value, list) else [value])]
    named += [result.base if result.base_is_local else None, result.manifest.get("output_dir")]
    named += result.manifest.get("local_paths", [])
    folders = [
        result.folder.resolve(),
        Path.cwd(),
        *(Path(os.path.abspath(Path(name).expanduser())) for name in named if name),
    ]
    paths = {str(path) for path in folders if len(path.parts) > 2}
    return sorted({*paths, f"{Path.home()}/"} - {"//"})


def _text_of(content: Path | bytes) -> bytes:
    if isinstance(content, bytes):
        return content
    with content.open("rb") as file:
        return file.read(_HEADER) if content.suffix == ".safetensors" else file.read()
