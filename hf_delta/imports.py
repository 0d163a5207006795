"""Users' own objects, by dotted path."""

import importlib
import os
import sys
from typing import Any

from hf_delta.errors import InputError


def load_object(path: str, key: str) -> Any:
    """Import `package.module.name`, also from the current directory.

    Args:
        path (`str`): Dotted path.
        key (`str`): Recipe key the path came from, for the message.

    Raises:
        `InputError`: the path has no dot, its module cannot be imported or fails while it is, or it has no such name.
    """
    module_name, _, name = path.rpartition(".")
    if not all(part.isidentifier() for part in path.split(".")) or not module_name:
        example = f"my_module.{path}" if path.isidentifier() else "my_module.my_function"
        raise InputError(f"{key}: {path!r} is not a dotted path such as {example}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"{key}: {path}: cannot import {module_name} ({error}).") from error
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{key}: {path}: {module_name} fails when it is imported ({reason}).") from error
    if not hasattr(module, name):
        raise InputError(f"{key}: {path}: module {module_name} has no name {name!r}.")
    return getattr(module, name)
