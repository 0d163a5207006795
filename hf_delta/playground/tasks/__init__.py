"""The task families by name; a user's own comes by the dotted path of its class."""

import inspect

from hf_delta.errors import InputError
from hf_delta.imports import load_object
from hf_delta.playground.tasks.addition import Addition
from hf_delta.playground.tasks.base import Level, Problem, Task
from hf_delta.playground.tasks.faulty_table import FaultyTable


TASKS: dict[str, type[Task]] = {"addition": Addition, "faulty_table": FaultyTable}

__all__ = ["TASKS", "Level", "Problem", "Task", "load_task"]


def load_task(name: str) -> Task:
    """The task of that name in `TASKS`, or of that dotted path (`package.module.Class`).

    Raises:
        InputError: if there is no such task, or the path does not lead to a subclass of `Task` that has `sample`.
    """
    if name in TASKS:
        return TASKS[name]()
    if "." not in name:
        known = ", ".join(sorted(TASKS))
        raise InputError(
            f"There is no playground task '{name}'. Use one of: {known}; or a path: package.module.Class."
        )
    found = load_object(name, "task")
    if not (inspect.isclass(found) and issubclass(found, Task)) or inspect.isabstract(found):
        raise InputError(f"task: {name} is not a subclass of hf_delta.playground.Task with a method `sample`.")
    return found()
