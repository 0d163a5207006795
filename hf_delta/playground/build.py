"""Builds a playground: a directory with a base model, its tokenizer and data files that any other tool can load."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from filelock import FileLock
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from hf_delta.errors import InputError
from hf_delta.playground.model import build_model
from hf_delta.playground.pretrain import STEPS, pretrain
from hf_delta.playground.rewards import playground_reward
from hf_delta.playground.tasks import Problem, Task, load_task
from hf_delta.playground.tokenizer import build_tokenizer


FORMAT_VERSION = 1
MANIFEST = "playground.json"
TRAIN_ROWS = 512  # each of these is per level
EVAL_ROWS = 48
DEMONSTRATIONS = 256
DRAWS_PER_ROW = 64


def build_playground(
    out: str | Path,
    *,
    seed: int = 0,
    task: str = "addition",
    pretrain_steps: int | None = None,
    progress: bool = True,
) -> Path:
    """Builds the playground in `out`, or returns at once if `out` already holds this very playground.

    The directory appears complete or not at all. The same arguments give the same bytes on one machine. Random states
    of the caller are left as they were.

    Args:
        out (`str` or `Path`): the directory to build.
        seed (`int`, *optional*, defaults to `0`): decides the base model and which problems the files hold.
        task (`str`, *optional*, defaults to `"addition"`): a name in `TASKS`, or the dotted path of a `Task`.
        pretrain_steps (`int`, *optional*): optimizer steps of pre-training, 750 by default; fewer for a quick check.
        progress (`bool`, *optional*, defaults to `True`): whether to show a progress bar.

    Returns:
        `Path`: `out`.

    Raises:
        InputError: if `out` is half-written, was changed, holds another playground or anything else, or if the task
            does not exist or cannot be used.
    """
    out = Path(out)
    steps = STEPS if pretrain_steps is None else pretrain_steps
    if steps < 1:
        raise InputError(f"pretrain_steps must be at least 1, got {steps}.")
    wanted = {"format_version": FORMAT_VERSION, "task": task, "seed": seed, "pretrain_steps": steps}
    if _is_complete(out, wanted):
        return out
    family = load_task(task)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if _is_complete(out, wanted):
            return out
        unfinished = out.parent / f".{out.name}.unfinished"
        # Whoever left it is gone: the lock is ours.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _write(unfinished, family, wanted, progress)
        unfinished.replace(out)
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
        raise InputError(f"{out} is a file. {remedy}")
    if not (out / MANIFEST).is_file():
        kind = "a half-written playground" if (out / "model").is_dir() else "something other than a playground"
        raise InputError(f"{out} holds {kind}: it has no {MANIFEST}. {remedy}")
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        found = {key: manifest[key] for key in wanted}
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{out / MANIFEST} cannot be read as the manifest of a playground: {error!r}. {remedy}"
        ) from error
    for key, value in wanted.items():
        if found[key] != value:
            raise InputError(f"{out} holds a playground with {key} {found[key]!r}, not {value!r}. {remedy}")
    for name, digest in files.items():
        if not (out / name).is_file():
            raise InputError(f"{out} holds a half-written playground: {name} is missing. {remedy}")
        if _digest(out / name) != digest:
            raise InputError(f"{out / name} is not the file that was built: it was changed or cut short. {remedy}")
    return True


def _write(directory: Path, task: Task, wanted: dict[str, Any], progress: bool) -> None:
    seed, steps = wanted["seed"], wanted["pretrain_steps"]
    counts = _write_data(directory, task, seed)
    _write_model(directory / "model", task, seed, steps, progress)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        **wanted,
        "levels": [level.name for level in task.levels],
        "rows": counts,
        "files": {path.relative_to(directory).as_posix(): _digest(path) for path in files},
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _write_model(directory: Path, task: Task, seed: int, steps: int, progress: bool) -> None:
    threads = torch.get_num_threads()
    # More threads only add overhead at this size, and would change the order of sums.
    torch.set_num_threads(1)
    try:
        tokenizer = build_tokenizer(task.alphabet)
        model = build_model(tokenizer, seed)
        with tqdm(total=steps, desc="Pre-training the base model", unit="step", disable=not progress) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            with torch.enable_grad():
                pretrain(model, tokenizer, task, seed=seed, steps=steps, on_step=on_step)
    finally:
        torch.set_num_threads(threads)
    with _no_transformers_bars():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextmanager
def _no_transformers_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _write_data(directory: Path, task: Task, seed: int) -> dict[str, int]:
    """Writes the four data files and returns how many rows each has."""
    rng = Random(f"{task.name} data {seed}")
    train, evaluation, demonstrations = [], [], []
    for level in task.levels:
        problems = _distinct(task, level.name, rng, TRAIN_ROWS, held_out=False)
        # A level with few problems repeats them, so that every level has as many rows.
        train += islice(cycle(problems), TRAIN_ROWS)
        demonstrations += problems[:DEMONSTRATIONS]
        evaluation += _distinct(task, level.name, rng, EVAL_ROWS, held_out=True)
    for problem in demonstrations:
        if not _is_right(problem, problem.careful):
            raise InputError(
                f"Task '{task.name}': the careful answer {problem.careful!r} to {problem.prompt!r} is wrong."
            )
    rng.shuffle(train)
    rng.shuffle(demonstrations)
    rows = {
        "train.jsonl": [_row(task, p, answer=p.answer) for p in train],
        "eval.jsonl": [_row(task, p, answer=p.answer) for p in evaluation],
        "sft.jsonl": [_row(task, p, completion=p.careful) for p in demonstrations],
        "preference.jsonl": [
            _row(task, p, chosen=p.careful, rejected=p.sloppy) for p in demonstrations if not _is_right(p, p.sloppy)
        ],
    }
    for name, content in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return {name: len(content) for name, content in rows.items()}


def _distinct(task: Task, level: str, rng: Random, count: int, *, held_out: bool) -> list[Problem]:
    """At most `count` different problems of a level from one side of the split, in the order they were drawn.

    Raises:
        InputError: if there is none.
    """
    problems: dict[str, Problem] = {}
    for _ in range(count * DRAWS_PER_ROW):
        problem = task.sample(level, rng)
        if problem.held_out == held_out:
            problems.setdefault(problem.expression, problem)
        if len(problems) == count:
            break
    if not problems:
        side = "held-out" if held_out else "training"
        raise InputError(f"Task '{task.name}': level '{level}' has no {side} problem; let it have more problems.")
    return list(problems.values())


def _row(task: Task, problem: Problem, **columns: str) -> dict[str, str]:
    prompt_id = f"{task.name}/{problem.level}/{problem.expression}"
    return {"prompt": problem.prompt, **columns, "level": problem.level, "prompt_id": prompt_id}


def _is_right(problem: Problem, response: str) -> bool:
    return playground_reward([response], [problem.answer]) == [1.0]


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
