"""Builds a playground: a directory with a base model, its tokenizer and data files that any other tool can load."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from hf_delta.errors import InputError
from hf_delta.paths import check_writable, expanded
from hf_delta.playground.data import write_data
from hf_delta.playground.model import build_model
from hf_delta.playground.pretrain import STEPS, pretrain
from hf_delta.playground.tasks import Task, load_task
from hf_delta.playground.tokenizer import build_tokenizer


FORMAT_VERSION = 2
MANIFEST = "playground.json"


def build_playground(
    out: str | Path,
    *,
    seed: int = 0,
    task: str = "addition",
    pretrain_steps: int | None = None,
    progress: bool = True,
) -> Path:
    """Builds the playground in `out`, or returns at once if `out` already holds this very playground.

    The directory appears complete or not at all, also when several processes ask for it together. The same arguments
    give the same bytes on one machine. Random states of the caller are left as they were.

    Args:
        out (`str` or `Path`): the directory to build; `~` is the home directory.
        seed (`int`, *optional*, defaults to `0`): decides the base model and which problems the files hold.
        task (`str`, *optional*, defaults to `"addition"`): a name in `TASKS`, or the dotted path of a `Task`.
        pretrain_steps (`int`, *optional*): optimizer steps of pre-training, 750 by default; fewer for a quick check.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `Path`: `out`.

    Raises:
        InputError: if an argument is out of range, the task does not exist or cannot be used, or `out` is half-written,
            was changed, holds another playground or something else, or cannot be written.
    """
    steps = STEPS if pretrain_steps is None else pretrain_steps
    if steps < 1:
        raise InputError(f"playground: pretrain_steps must be at least 1, got {steps}.")
    if not 0 <= seed < 2**32:
        raise InputError(f"playground: seed must lie in [0, 2**32), got {seed}.")
    wanted = {"format_version": FORMAT_VERSION, "task": task, "seed": seed, "pretrain_steps": steps}
    out = expanded(out)
    if not os.path.exists(out):
        check_writable(out, "playground", directory=True)
    target = out.resolve()
    if _is_complete(target, wanted):
        return out
    family = load_task(task)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.parent / f".{target.name}.lock"
        with FileLock(lock):
            if not _is_complete(target, wanted):
                _build(target, family, wanted, progress)
            # Whoever waits finds the playground complete, so there is nothing left to guard; Windows may refuse.
            with suppress(OSError):
                lock.unlink()
    except OSError as error:
        raise InputError(f"The playground cannot be written to {out}: {error}.") from error
    return out


def _is_complete(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds the wanted playground; `False` if it is absent or empty.

    Raises:
        InputError: in every other case.
    """
    remedy = "Delete it, or build the playground elsewhere."
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise InputError(f"playground: {out} is a file. Name another directory.")
    if not (out / MANIFEST).is_file():
        kind = "a half-written playground" if (out / "model").is_dir() else "something other than a playground"
        raise InputError(f"{out} holds {kind}: it has no {MANIFEST}. {remedy}")
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        found = {key: manifest[key] for key in wanted}
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out / MANIFEST} is not the manifest of a playground: {error!r}. {remedy}") from error
    for key, value in wanted.items():
        if found[key] != value:
            raise InputError(f"{out} holds a playground with {key} {found[key]!r}, not {value!r}. {remedy}")
    for name, digest in files.items():
        if not (out / name).is_file():
            raise InputError(f"{out} holds a half-written playground: {name} is missing. {remedy}")
        if _digest(out / name) != digest:
            raise InputError(f"{out / name} is not the file that was built: it was changed or cut short. {remedy}")
    return True


def _build(target: Path, task: Task, wanted: dict[str, Any], progress: bool) -> None:
    unfinished = target.parent / f".{target.name}.unfinished"
    # Whoever left it there is gone, since the lock is ours.
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    rows = write_data(unfinished, task, wanted["seed"])
    _write_model(unfinished / "model", task, wanted["seed"], wanted["pretrain_steps"], progress)
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    manifest = {
        **wanted,
        "levels": [level.name for level in task.levels],
        "rows": rows,
        "files": {path.relative_to(unfinished).as_posix(): _digest(path) for path in files},
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(target)


def _write_model(directory: Path, task: Task, seed: int, steps: int, progress: bool) -> None:
    tokenizer = build_tokenizer(task.alphabet)
    model = build_model(tokenizer, seed)
    bar = tqdm(total=steps, desc="Pre-training the base model", unit="step", disable=not progress)

    def on_step(loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()

    with bar, _one_thread():
        pretrain(model, tokenizer, task, seed=seed, steps=steps, on_step=on_step)
    with _no_transformers_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def _one_thread() -> Iterator[None]:
    # More threads only cost time at this size, and they would change the order of sums.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_transformers_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
