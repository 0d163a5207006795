"""Files of our own in a checkpoint: one safetensors file per state, and which checkpoints are complete.

A state is nested dicts and lists whose leaves are tensors, numbers, strings, booleans or `None`. Tensors are stored as
tensors and the rest as one JSON text in the header, so that nothing needs pickle.
"""

import json
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hf_delta.errors import InputError


FORMAT = "hf_delta.state"
FORMAT_VERSION = 1
_TENSOR = "__tensor__"

STATE_FILE = "hf_delta_state.safetensors"
ROLLOUTS_FILE = "hf_delta_rollouts_{rank}.safetensors"


def save_state(path: str | Path, state: Any) -> None:
    """Write a state to a safetensors file; a reader never sees half of it.

    Raises:
        `TypeError`: a leaf is neither a tensor nor something JSON can hold.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _pack(state, tensors)
    # The header is a flat map of strings, hence JSON inside it. NaN must not slip through: JSON has none.
    text = json.dumps(structure, allow_nan=False)
    header = {"format": FORMAT, "version": str(FORMAT_VERSION), "structure": text, "crc32": _checksum(text, tensors)}
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata=header)
    os.replace(partial, path)


def check_state(state: Any) -> None:
    """Whether [`save_state`] can write a state.

    Raises:
        `TypeError` or `ValueError`: it cannot, and why.
    """
    json.dumps(_pack(state, {}), allow_nan=False)


def load_state(path: str | Path) -> Any:
    """Read what [`save_state`] wrote.

    Raises:
        `InputError`: the file is cut short or damaged, is not one of ours, or was written in a newer format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise InputError(f"{path} is not a state file of hf_delta.")
            if header.get("version") != str(FORMAT_VERSION):
                raise InputError(
                    f"{path} is in state format {header.get('version')}, and this hf_delta reads format "
                    f"{FORMAT_VERSION}: resume with the version of hf_delta that wrote it."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = header["structure"]
        if header["crc32"] != _checksum(text, tensors):
            raise InputError(f"{path} is damaged: its checksum is another. Resume from an earlier checkpoint.")
        return _unpack(json.loads(text), tensors)
    except (SafetensorError, ValueError, LookupError, TypeError, OSError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} cannot be read ({error}): it is cut short or damaged. Resume from an earlier checkpoint."
        ) from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A clone, because safetensors refuses views that share storage. Its format is said, because one element of an
        # expanded tensor would keep its stride of 0, and no bytes could be seen through it.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            raise TypeError(f"Keys of a state must be strings, got {sorted(map(repr, value))[:3]}.")
        return {key: _pack(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A state holds tensors, numbers, strings, dicts and lists, got {type(value).__name__}.")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    return value


def _checksum(structure: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of all that a state is; what safetensors itself leaves unchecked."""
    value = zlib.crc32(structure.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` of a run, that with the largest `N` first, complete or not."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)


def newest_complete_checkpoint(output_dir: str | Path, world_size: int = 1) -> Path | None:
    """The `checkpoint-N` with the largest `N` that every process wrote to its end, or `None`, see [`is_complete`]."""
    return next((path for path in checkpoints(output_dir) if is_complete(path, world_size)), None)


def steps_of(checkpoint: str | Path) -> int:
    """Optimizer steps that a complete checkpoint has behind it.

    Raises:
        `InputError`: its `trainer_state.json` cannot be read, or does not say.
    """
    path = Path(checkpoint) / "trainer_state.json"
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error!r}). Resume from an earlier checkpoint.") from error
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise InputError(f"{path} is damaged: global_step is {steps!r}. Resume from an earlier checkpoint.")
    return steps


def written_under(checkpoint: str | Path) -> str | None:
    """How the run was spread that wrote a checkpoint, or `None` if it holds no optimizer from which one could tell."""
    names = {path.name for path in Path(checkpoint).glob("*")}
    if any(re.fullmatch(r"global_step\d+", name) for name in names):
        # Each process writes its part of the weights there, if they are in parts.
        in_parts = any(Path(checkpoint).glob("global_step*/zero_pp_rank_*_model_states.pt"))
        return "DeepSpeed ZeRO-3" if in_parts else "DeepSpeed with whole weights"
    if "pytorch_model_fsdp.bin" in names:
        return "FSDP with FULL_STATE_DICT"
    if any(name.startswith("pytorch_model_fsdp_") for name in names):
        return "FSDP with SHARDED_STATE_DICT"
    return "no sharding" if "optimizer.pt" in names else None


def zero_partitions(checkpoint: str | Path) -> int:
    """Processes among which DeepSpeed divided the optimizer of a checkpoint, `0` if it did not write it."""
    return len(list(Path(checkpoint).glob("global_step*/*zero_pp_rank_*_optim_states.pt")))


def is_complete(checkpoint: str | Path, world_size: int = 1) -> bool:
    """Whether a checkpoint was written to its end by every process.

    A process killed while it saves leaves a checkpoint without the last file of rank 0, `trainer_state.json`, without the
    random state of another rank, or with a torch file cut short; killed while it deletes, one that lacks a part of the state.

    Args:
        checkpoint (`str` or `Path`): Directory of the checkpoint.
        world_size (`int`, *optional*, defaults to `1`): Processes of this run. How many wrote the checkpoint stands in it
            if a trainer of ours did; otherwise more than one are taken for granted where this run has more than one.
    """
    checkpoint = Path(checkpoint)
    try:
        steps_of(checkpoint)
    except InputError:
        return False
    ranks = len(list(checkpoint.glob("rng_state_*.pth")))
    if 0 < ranks < _writers(checkpoint, default=min(world_size, 2)):
        return False
    if not _has_all_of_the_state({path.name for path in checkpoint.glob("*")}):
        return False
    # The directory at the end of a zip file is what torch.save writes last; safetensors knows its length from its header.
    whole = all(zipfile.is_zipfile(path) for pattern in ("*.pt", "*.pth") for path in checkpoint.glob(pattern))
    return whole and _has_weights(checkpoint) and all(map(_is_whole, checkpoint.glob("*.safetensors")))


def _has_all_of_the_state(names: set[str]) -> bool:
    """Whether optimizer, scheduler and random state are there, or none of them, as with `save_only_model`."""
    if "optimizer.pt" in names:
        return "scheduler.pt" in names and any(name.startswith("rng_state") for name in names)
    elsewhere = any(name.startswith(("optimizer", "pytorch_model_fsdp", "global_step")) for name in names)
    return elsewhere or "scheduler.pt" not in names


def _has_weights(checkpoint: Path) -> bool:
    """Whether there are weights: all files of an index, one file, or those of FSDP or DeepSpeed."""
    for index in checkpoint.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return False
        if not all((checkpoint / str(name)).is_file() for name in names):
            return False
    patterns = ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp*", "global_step*")
    return any(any(checkpoint.glob(pattern)) for pattern in patterns)


def _is_whole(path: Path) -> bool:
    if path.name == STATE_FILE:
        # Ours says itself what is wrong with it, to whoever resumes from it.
        return True
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _writers(checkpoint: Path, default: int) -> int:
    """How many processes wrote a checkpoint."""
    try:
        writers = load_state(checkpoint / STATE_FILE)["layout"]["num_processes"]
    except (InputError, LookupError, TypeError):
        # No such file, or a damaged one: whoever reads it to resume will say so.
        return default
    return writers if isinstance(writers, int) else default
