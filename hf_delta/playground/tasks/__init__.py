"""The task families by name; a user's own comes by the dotted path of its class."""

from importlib import import_module

from hf_delta.errors import InputError
from hf_delta.playground.tasks.addition import Addition
from hf_delta.playground.tasks.base import Level, Problem, Task


TASKS: dict[str, type[Task]] = {"addition": Addition}

__all__ = ["TASKS", "Level", "Problem", "Task", "load_task"]


def load_task(name: str) -> Task:
    """The task of that name in `TASKS`, or of that dotted path (`package.module.Class`).

    Raises:
        InputError: if there is no such task, or the path does not lead to a subclass of `Task`.
    """
    if name in TASKS:
        return TASKS[name]()
    known = ", ".join(sorted(TASKS))
    module_name, _, class_name = name.rpartition(".")
    if not module_name:
        raise InputError(
            f"There is no playground task '{name}'. Use one of: {known}; or a path: package.module.Class."
        )
    try:
        found = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(f"The playground task '{name}' cannot be imported: {error}.") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise InputError(f"The playground task '{name}' is not a subclass of hf_delta.playground.Task.")
    return found()
