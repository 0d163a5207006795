"""Directories of PEFT's Bone and MiSS to ours and back; the tensors stay bit for bit."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_delta.adapters.bone.config import BoneConfig
from hf_delta.adapters.bone.formats import (
    ABOUT_THE_FILE,
    BLOCK_NAMES,
    MISS,
    OLD_BONE,
    OURS,
    SHARED_FIELDS,
    bone_config,
    miss_config,
    rename_blocks,
)
from hf_delta.errors import InputError


logger = logging.getLogger(__name__)

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def convert_to_bone(source: str | Path, out: str | Path) -> Path:
    """Write an adapter that PEFT's Bone (0.14 to 0.18) or MiSS saved as an adapter for [`BoneConfig`].

    Args:
        source (`str` or `Path`): directory with `adapter_config.json` and `adapter_model.safetensors`.
        out (`str` or `Path`): directory to make.

    Returns:
        `Path`: `out`.

    Raises:
        `InputError`: `source` is no such adapter, tensors do not fit its configuration, or `out` has files.
    """
    source, out = Path(source), _free(out)
    fields = _read_fields(source, (OLD_BONE, MISS))
    config, tensors = _bone_config(source, fields), _read_tensors(source)
    _check_blocks(source, tensors, BLOCK_NAMES[fields["peft_type"]], config)
    return _write(out, config, rename_blocks(tensors, fields["peft_type"], OURS))


def convert_to_miss(source: str | Path, out: str | Path) -> Path:
    """Write an adapter of [`BoneConfig`], or of PEFT's Bone, as an adapter for PEFT's `MissConfig`.

    PEFT has the modes `bone`, `mini` and `bat_col`. It takes no notice of dropout in the last one.

    Args:
        source (`str` or `Path`): directory with `adapter_config.json` and `adapter_model.safetensors`.
        out (`str` or `Path`): directory to make.

    Returns:
        `Path`: `out`.

    Raises:
        `InputError`: PEFT has no such mode, `source` is no such adapter, tensors do not fit its configuration, or `out`
            has files.
    """
    source, out = Path(source), _free(out)
    fields = _read_fields(source, (OLD_BONE, OURS))
    config = _bone_config(source, fields)
    target, tensors = miss_config(config), _read_tensors(source)
    _check_blocks(source, tensors, BLOCK_NAMES[fields["peft_type"]], config)
    return _write(out, target, rename_blocks(tensors, fields["peft_type"], MISS))


def _free(out: str | Path) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; name a new directory.")
    return out


def _read_fields(source: Path, wanted: tuple[str, ...]) -> dict:
    path = source / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as the configuration of an adapter ({error}).") from error
    found = fields.get("peft_type") if isinstance(fields, dict) else None
    if found not in wanted:
        raise InputError(f"{path}: peft_type is {found!r}, and this conversion reads {' and '.join(wanted)}.")
    known = {*SHARED_FIELDS, *ABOUT_THE_FILE, "init_weights", "bias", "mini_r", "miss_dropout"}
    dropped = sorted(name for name, value in fields.items() if name not in known and value is not None)
    if found != OURS and dropped:
        logger.warning("%s: fields that Bone does not have were left out: %s", path, ", ".join(dropped))
    return fields


def _bone_config(source: Path, fields: dict) -> BoneConfig:
    try:
        return BoneConfig.from_pretrained(source) if fields["peft_type"] == OURS else bone_config(fields)
    except InputError as error:
        raise InputError(f"{source / CONFIG}: {error}") from error


def _read_tensors(source: Path) -> dict[str, torch.Tensor]:
    path = source / TENSORS
    if not path.exists() and (source / PICKLE).exists():
        raise InputError(
            f"{source / PICKLE}: is a pickle file, which can run code and is not read here. If you trust it: "
            "safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            "'adapter_model.safetensors', metadata={'format': 'pt'})"
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read ({error}).") from error


def _check_blocks(source: Path, tensors: dict[str, torch.Tensor], ending: str, config: BoneConfig) -> None:
    """The sizes of the layers are not known here, so only what the configuration alone decides is compared."""
    blocks = {name: tuple(value.shape) for name, value in tensors.items() if name.endswith(ending)}
    if not blocks:
        raise InputError(f"{source / TENSORS}: has no tensor whose name ends in {ending}.")
    r = config.r
    expected = {
        "bone": (r, None),
        "row": (r, None),
        "mini": (r, config.mini_r),
        "bat_row": (None, r, r),
        "bat_col": (None, r, r),
    }[config.mode]
    for name, shape in blocks.items():
        if not tensors[name].isfinite().all():
            raise InputError(
                f"{source / TENSORS}: {name} holds NaN or infinite values: the file is broken or training diverged; "
                "take an earlier checkpoint."
            )
        if len(shape) != len(expected) or any(want not in (None, have) for want, have in zip(expected, shape)):
            wanted = ", ".join("any" if size is None else str(size) for size in expected)
            raise InputError(
                f"{source / TENSORS}: {name} has the shape {shape}, and {CONFIG} says mode {config.mode}, which is "
                f"({wanted}): the two files do not belong together, or the adapter was merged in 16 bit by a PEFT that "
                "changed it."
            )


def _write(out: Path, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> Path:
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        config.save_pretrained(partial)
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out
