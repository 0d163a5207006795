"""The data files of a playground: training and held-out problems, demonstrations, preferences and lists."""

import json
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

from hf_delta.errors import InputError
from hf_delta.playground.lists import listed, token_weights
from hf_delta.playground.rewards import playground_reward
from hf_delta.playground.tasks import Problem, Task
from hf_delta.playground.tokenizer import MAX_LENGTH


# Rows of each level.
TRAIN_ROWS = 512
EVAL_ROWS = 48
DEMONSTRATIONS = 256
DRAWS_PER_ROW = 64


def write_data(directory: Path, task: Task, seed: int) -> dict[str, int]:
    """Writes `train.jsonl`, `eval.jsonl`, `sft.jsonl`, `preference.jsonl`, `weighted.jsonl` and `lists.jsonl`.

    Only `eval.jsonl` has held-out problems. A level with fewer problems than rows repeats them in `train.jsonl`, so
    that levels are uniform there; the other files hold no problem twice.

    Returns:
        `dict[str, int]`: how many rows each file has.

    Raises:
        InputError: if a level has no problem on one side of the split, or a problem of the task cannot be used.
    """
    rng = Random(f"{task.name} data {seed}")
    train: list[Problem] = []
    evaluation: list[Problem] = []
    demonstrated: list[Problem] = []
    for level in task.levels:
        problems = _distinct(task, level.name, rng, TRAIN_ROWS, held_out=False)
        train += islice(cycle(problems), TRAIN_ROWS)
        demonstrated += problems[:DEMONSTRATIONS]
        evaluation += _distinct(task, level.name, rng, EVAL_ROWS, held_out=True)
    rng.shuffle(train)
    rng.shuffle(demonstrated)
    # A guess can be right by luck; then it is no worse than the careful answer.
    judged = [problem for problem in demonstrated if not _is_right(problem, problem.sloppy)]
    rows = {
        "train.jsonl": [_row(task, p, answer=p.answer) for p in train],
        "eval.jsonl": [_row(task, p, answer=p.answer) for p in evaluation],
        "sft.jsonl": [_row(task, p, completion=p.careful) for p in demonstrated],
        "preference.jsonl": [_row(task, p, **_pair(p)) for p in judged],
        "weighted.jsonl": [_row(task, p, **_pair(p), **_weights(p)) for p in judged],
        # Random numbers of its own, so that the other files do not depend on what is drawn for lists.
        "lists.jsonl": [
            _row(task, p, **columns) for p, columns in listed(judged, Random(f"{task.name} lists {seed}"))
        ],
    }
    for name, content in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        (directory / name).write_text(text, encoding="utf-8", newline="\n")
    return {name: len(content) for name, content in rows.items()}


def _distinct(task: Task, level: str, rng: Random, count: int, *, held_out: bool) -> list[Problem]:
    """At most `count` different problems of a level from one side of the split, in the order they were drawn."""
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
    for problem in problems.values():
        _check(task, problem, level)
    return list(problems.values())


def _check(task: Task, problem: Problem, level: str) -> None:
    where = f"Task '{task.name}', level '{level}', problem '{problem.expression}'"
    if problem.level != level:
        raise InputError(f"{where}: it says that its level is '{problem.level}'.")
    if not _is_right(problem, problem.careful):
        raise InputError(
            f"{where}: the careful response {problem.careful!r} does not end in '#' and the answer {problem.answer!r}."
        )
    for response in (problem.careful, problem.sloppy):
        unknown = sorted(set(problem.prompt + response) - set(task.alphabet))
        if unknown:
            raise InputError(f"{where}: {unknown[0]!r} is not in the alphabet of the task; add it there.")
        # One token more ends the response.
        if len(problem.prompt + response) >= MAX_LENGTH:
            raise InputError(f"{where}: prompt and response must be shorter than {MAX_LENGTH} characters.")


def _pair(problem: Problem) -> dict[str, str]:
    return {"chosen": problem.careful, "rejected": problem.sloppy}


def _weights(problem: Problem) -> dict[str, list[float]]:
    return {f"{side}_weights": token_weights(response) for side, response in _pair(problem).items()}


def _row(task: Task, problem: Problem, **columns: Any) -> dict[str, Any]:
    prompt_id = f"{task.name}/{problem.level}/{problem.expression}"
    return {"prompt": problem.prompt, **columns, "level": problem.level, "prompt_id": prompt_id}


def _is_right(problem: Problem, response: str) -> bool:
    return playground_reward([response], [problem.answer]) == [1.0]
