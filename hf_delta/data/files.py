"""Local files of rows, and datasets of the Hub."""

import codecs
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from hf_delta.errors import InputError
from hf_delta.paths import expanded
from hf_delta.recipe.arguments import DataArguments


# A leading underscore keeps the directory out of uploads to the Hub.
CACHE = "_datasets"

# Beginnings of gzip, zip, bzip2, xz and zstandard, which datasets unpacks whatever the file is called.
_ARCHIVES = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Rows and where they came from: a file, or a dataset of the Hub."""

    name: str
    rows: Dataset


def load_files(files: str | list[str], key: str, cache_dir: Path) -> list[Source]:
    """The rows of local files.

    Args:
        files (`str` or `list[str]`): Their paths.
        key (`str`): Key that they stand in, for messages.
        cache_dir (`Path`): Where the converted files go.

    Raises:
        `InputError`: one is not there, or not what its name says; with the line where that is known.
    """
    sources = []
    if not files:
        raise InputError(f"{key} names no file.")
    for name in [files] if isinstance(files, str) else files:
        path = expanded(name)
        # Those of os.path say no where those of pathlib raise: of a name that is too long.
        if os.path.isdir(path):
            raise InputError(f"{key}: {path} is a directory; name the files in it.")
        if not os.path.isfile(path):
            raise InputError(f"{key}: {path} does not exist.")
        builder = _BUILDERS.get(path.suffix)
        if builder is None:
            raise InputError(f"{key}: {path} is none of {', '.join(_BUILDERS)}.")
        sources.append(Source(str(path), _load_file(path, builder, cache_dir)))
    return sources


def _load_file(path: Path, builder: str, cache_dir: Path) -> Dataset:
    try:
        with path.open("rb") as file:
            beginning = file.read(4096)
        if builder == "json" and (where := _null(path)) is not None:
            raise InputError(f"{path}{where}: null is no row. Remove it.")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if not beginning.strip():
        raise InputError(f"{path} has no rows.")
    if builder != "parquet" and beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{path}: not UTF-8 text, but UTF-16. Save it as UTF-8.")
    try:
        with _silent():
            return load_dataset(builder, data_files=str(path), split="train", cache_dir=str(cache_dir))
    except Exception as error:
        # Besides those of datasets, whatever a parser or an archive that datasets has opened by itself raises.
        if "corresponds to no data" in str(error):
            # So says datasets of a file with a header or brackets and nothing else.
            raise InputError(f"{path} has no rows.") from error
        if beginning.startswith(_ARCHIVES):
            raise InputError(f"{path}: an archive that cannot be unpacked: {_reason(error)}") from error
        where, reason = malformed(path) if builder == "json" else ("", "")
        raise InputError(f"{path}{where}: {reason or _reason(error)}") from error


def _null(path: Path) -> str | None:
    """The place of a `null` where a row should be, which Arrow does not survive; `None` if there is none."""
    with path.open("rb") as file:
        if path.suffix == ".json":
            return "" if file.read(64).strip() == b"null" else None
        return next((f":{number}" for number, line in enumerate(file, start=1) if line.strip() == b"null"), None)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the errors that datasets logs before it raises them."""
    there = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(there)


def _reason(error: BaseException) -> str:
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text ({error.reason}). Save it as UTF-8."
    if isinstance(error, RecursionError):
        return "a value is nested too deeply."
    return str(error) or type(error).__name__


def malformed(path: Path) -> tuple[str, str]:
    """Line and reason of the first thing in a JSON file that is not what it should be; empty where all is well."""
    # A `.json` file is one text, and `.jsonl` one on each line.
    texts = [path.read_bytes()] if path.suffix == ".json" else path.read_bytes().splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            row = json.loads(text, object_pairs_hook=_once) if text.strip() else {}
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            return f":{number}", f"not UTF-8 text ({error.reason}). Save it as UTF-8."
        except UnicodeEncodeError:
            return f":{number}", "half of a surrogate pair (\\ud800 to \\udfff), which is no text."
        except json.JSONDecodeError as error:
            return f":{number + error.lineno - 1}", f"not valid JSON ({error.msg})."
        except RecursionError:
            return f":{number}", "a value is nested too deeply."
        except InputError as error:
            return f":{number}", str(error)
        if path.suffix == ".jsonl" and not isinstance(row, dict):
            return f":{number}", "a line must be a JSON object, {…}."
    return "", ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{key!r} stands there twice.")
        found[key] = value
    return found


def load_from_hub(args: DataArguments, split: str) -> Source:
    name = f"{args.dataset_name} ({split})"
    try:
        return Source(name, load_dataset(args.dataset_name, args.dataset_config, split=split))
    except (ValueError, OSError) as error:
        raise InputError(
            f"dataset_name: {name} cannot be loaded: {error}. Is its name right, and the Hub within reach?"
        ) from error
