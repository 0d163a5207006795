"""Selections that took long, kept in a folder by the hash of the weight they were made from."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_delta.adapters.pmss.selection import select_skeleton


logger = logging.getLogger(__name__)

# Multiplications, `o i k`, from which on a selection is kept: about half a second of one core, and several times what
# it takes to hash the weight.
WORTH_KEEPING = 2**31
# Raised when the same arguments are to give another choice.
VERSION = 1


def cached_selection(
    weight: torch.Tensor, k: int, method: str, seed: int, oversample: int, folder: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`select_skeleton`], read from `folder` where the same was asked of the same weight before.

    A folder that cannot be read or written is a warning and no more: the selection is made instead.

    Args:
        weight: `(o, i)`.
        folder: None keeps nothing; small weights are never kept.

    Returns:
        Indices of rows and of columns, int64 `(k,)` each.
    """
    if folder is None or method in ("norm", "uniform") or weight.numel() * k < WORTH_KEEPING:
        return select_skeleton(weight, k, method, seed, oversample)
    path = Path(folder).expanduser() / f"{selection_key(weight, k, method, seed, oversample)}.safetensors"
    found = _read(path, weight.shape, k)
    if found is None:
        found = select_skeleton(weight, k, method, seed, oversample)
        _write(path, *found)
    return tuple(indices.to(weight.device) for indices in found)


def selection_key(weight: torch.Tensor, k: int, method: str, seed: int, oversample: int) -> str:
    """Hash of everything that a selection depends on."""
    hashed = hashlib.sha256(repr((VERSION, tuple(weight.shape), str(weight.dtype), k, method)).encode())
    if method != "pivoted_qr":
        hashed.update(repr((seed, oversample)).encode())
    hashed.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy())
    return hashed.hexdigest()


def _read(path: Path, shape: torch.Size, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
        rows, columns = tensors["rows"], tensors["columns"]
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s cannot be read and is made again: %s", path, error)
        return None
    for indices, size in ((rows, shape[0]), (columns, shape[1])):
        if indices.dtype != torch.int64 or indices.shape != (k,) or not 0 <= indices.min() <= indices.max() < size:
            logger.warning("%s holds no selection of %d out of %s and is made again", path, k, tuple(shape))
            return None
    return rows, columns


def _write(path: Path, rows: torch.Tensor, columns: torch.Tensor) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write the same file: each writes its own and renames it.
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        try:
            save_file({"rows": rows.cpu(), "columns": columns.cpu()}, temporary)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the selection cannot be kept in %s: %s", path.parent, error)
