"""Which files of a directory are a model or an adapter that others can load, and the last look at them before they leave."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from hf_delta import private
from hf_delta.errors import InputError


Files = dict[str, Path | bytes]  # by path in the repository: a file as it is, or what takes its place

_ADAPTER = ("adapter_model*.safetensors", "adapter_model.safetensors.index.json")
_MODEL = ("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "LICENSE*")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "*processor_config.json",
)
# Words of a language, among which anybody's name may be.
_VOCABULARIES = re.compile(r"tokenizer\.json|vocab\..*|merges\.txt|added_tokens\.json|.*\.(model|tiktoken)")


def public_files(folder: Path, adapter: bool) -> list[Path]:
    """Weights, configuration and tokenizer of a directory, and nothing else that lies in it.

    Args:
        folder (`Path`): What `save_pretrained` has written to, and others maybe too.
        adapter (`bool`): Whether the weights are those of an adapter; else those of a model, with its own code if it has any.
    """
    patterns = (*(_ADAPTER if adapter else _MODEL), *_TOKENIZER)
    if not adapter and _has_own_code(folder):
        patterns += ("*.py",)
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _has_own_code(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and '"auto_map"' in config.read_text(encoding="utf-8")


def check_files(files: Files, folder: Path, paths: Iterable[str], tokens: Iterable[str | None] = ()) -> None:
    """Search what is about to leave, all of it but tensors.

    Args:
        files (`dict`): What each file in the repository will hold.
        folder (`Path`): Where they come from, for the message.
        paths (`Iterable[str]`): Absolute paths that must not be in it, besides home directories.
        tokens (`Iterable[str]`, *optional*): Tokens that must not be in it, besides those of this process.

    Raises:
        `InputError`: a file holds a token, a path of this disk, or the name of this machine. Nothing was pushed.
    """
    secrets, paths, homes, machine = private.secrets(*tokens), list(paths), private.homes(), private.machine()
    for name, content in files.items():
        data = _text_of(content)
        # In the bytes of a picture anything may stand by chance.
        no_text = _VOCABULARIES.fullmatch(Path(name).name) is not None or name.endswith(".png")
        if any(_holds(data, secret) for secret in secrets) or (
            not name.endswith(".png") and private.holds_token(data)
        ):
            raise InputError(f"{folder / name} holds a token: take it out. Nothing was pushed.")
        for path in paths if no_text else [*paths, *homes]:
            if _holds(data, path):
                raise InputError(
                    f"{folder / name} holds the local path {path}: take it out, or write a name of the Hub. Nothing was pushed."
                )
        for host in [] if no_text else machine:
            if re.search(rf"(?<![\w.-]){re.escape(host)}(?![\w-])".encode(), data):
                raise InputError(
                    f"{folder / name} holds {host}, the name of this machine: take it out. Nothing was pushed."
                )


def _holds(data: bytes, text: str) -> bool:
    """Whether a text stands in a file, as it is or as JSON has it."""
    return text.encode() in data or json.dumps(text)[1:-1].encode() in data


def _text_of(content: Path | bytes) -> bytes:
    """All of a file, or all but the tensors."""
    if isinstance(content, bytes):
        return content
    with content.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little")) if content.suffix == ".safetensors" else file.read()
