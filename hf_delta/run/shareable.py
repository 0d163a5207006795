"""Which files of a result are for others, and what must not stand in them."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from hf_delta import private
from hf_delta.errors import InputError
from hf_delta.plot.figure import CURVES
from hf_delta.public import Files, check_files, public_files
from hf_delta.run.card import Names, card_of, local_card, revision_of
from hf_delta.run.directory import MANIFEST
from hf_delta.run.paths import local_paths
from hf_delta.run.result import Result


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
    for path in [*public_files(folder, result.adapter is not None), *folder.glob(CURVES)]:
        found[path.relative_to(folder).as_posix()] = _plain(path, result, repo, base)
    if result.adapter is not None:
        found["adapter_config.json"] = as_json(adapter_config(result.adapter, base))
    if result.manifest:
        found[MANIFEST] = as_json(shared_manifest(result, base))
    values = shown_values(result, base)
    names = Names(repo, base, values, lora_error, CURVES in found, revision_of(result), result.dataset)
    found["README.md"] = shared_card(result, names).encode()
    return found


def adapter_config(config: dict[str, Any], base: str | None) -> dict[str, Any]:
    """`adapter_config.json` with the id of the base model; fields that hold another local path get their default."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(config.get("peft_type"))
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    defaults = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    shared = {**config, "base_model_name_or_path": base}
    for key, value in config.items():
        if key != "base_model_name_or_path" and private.shared(value, local_paths(value)) != value:
            shared[key] = defaults.get(key) if isinstance(value, str) else private.shared(value, local_paths(value))
    return shared


def shown_values(result: Result, base: str | None) -> dict[str, Any]:
    """The recipe's keys with files by their names alone, without those that concern this disk or the upload."""
    shown = {}
    for key, value in result.values.items():
        if key in _TRAINING_ONLY or key.startswith("hub_") or key in ("base_model_id", "push_lora"):
            continue
        if key == "model_name_or_path":
            shown[key] = base if base is not None else private.name_of(value)
        elif key in _FILES:
            shown[key] = [*map(private.name_of, value)] if isinstance(value, list) else private.name_of(value)
        else:
            shown |= private.shared({key: value}, result.manifest.get("local_paths", []))
    return shown


def shared_manifest(result: Result, base: str | None) -> dict[str, Any]:
    """`run.json` without local paths; `hf-delta export` finds in it how the base model was quantised."""
    manifest = {key: value for key, value in result.manifest.items() if key not in _OF_THIS_DISK}
    local = result.manifest.get("local_paths", [])
    shared = private.shared({key: value for key, value in manifest.items() if key != "values"}, local)
    if base is not None:
        shared["method"]["model_name_or_path"] = base
    for key in ("recipe", "resumed_from"):
        shared[key] = private.name_of(manifest.get(key))
    return {**shared, "values": shown_values(result, base)}


def shared_card(result: Result, names: Names) -> str:
    """The card under the names of the Hub; a card that somebody has edited is kept, with its names replaced."""
    path = result.folder / "README.md"
    own = path.read_text(encoding="utf-8") if path.is_file() else ""
    ours = [str(local_card(result, folder)) for folder in (None, result.manifest.get("output_dir"))]
    if not own.strip() or "[More Information Needed]" in own or own in ours:
        manifest = shared_manifest(result, names.base) if result.manifest else {}
        return str(card_of(dataclasses.replace(result, manifest=manifest), names))
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
    try:
        content = json.loads(renamed)
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): it is damaged.") from error
    clean = private.shared(content, sentences=False)
    if clean != content:
        return as_json(clean)
    return path if renamed == text else renamed.encode()


def _renamed(text: str, result: Result, repo: str, base: str | None) -> str:
    local = result.manifest.get("local_paths", [])
    known = private.replaced(result.values, local) | {path: private.name_of(path) for path in local}
    known |= {folder: repo for folder in (str(result.folder.resolve()), result.manifest.get("output_dir")) if folder}
    if base is not None and result.base_is_local:
        names = (result.base, os.path.abspath(result.base), result.values.get("model_name_or_path"))
        known |= {name: base for name in names if isinstance(name, str) and len(name) > 1}
    for name in sorted(known, key=len, reverse=True):
        text = re.sub(rf"{re.escape(name)}(?![\w-])", known[name], text)
    return text


def as_json(content: dict[str, Any]) -> bytes:
    """A JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def check_nothing_private(files: Files, result: Result, token: str | None = None) -> None:
    """The last look at what is about to leave.

    Raises:
        `InputError`: a file holds a token, a path of this disk, or the name of this machine.
    """
    check_files(files, result.folder, _private_paths(result), [token, result.values.get("hub_token")])


def _private_paths(result: Result) -> list[str]:
    """Absolute paths that say something about this disk: long enough that no other text holds them by chance."""
    values = [result.values.get(key) for key in _FILES]
    named = [one for value in values for one in (value if isinstance(value, list) else [value])]
    named += [result.base if result.base_is_local else None, result.manifest.get("output_dir")]
    return private.forms([result.folder, Path.cwd(), *named, *result.manifest.get("local_paths", [])])
