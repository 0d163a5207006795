"""Rules that a recipe names: from ours by name, or a user's own by dotted path, with their arguments."""

import inspect
import json
from collections.abc import Mapping
from difflib import get_close_matches
from numbers import Real
from typing import Any

from hf_delta.errors import InputError
from hf_delta.imports import load_object


def named_rule(name: str, known: Mapping[str, Any], key: str) -> Any:
    """The rule of that name in `known`, or of that dotted path: a class or a function.

    Raises:
        `InputError`: there is none, or it cannot be called.
    """
    if not isinstance(name, str):
        raise InputError(
            f"{key} takes a name or a dotted path, got {name!r}; give objects to the trainer, as its {key}."
        )
    if name not in known and "." not in name:
        raise InputError(f"{key}: there is no {name!r}. Write one of {', '.join(sorted(known))}, or a dotted path.")
    rule = known.get(name) or load_object(name, key=key)
    if not callable(rule):
        raise InputError(f"{key}: {name} is neither a function nor a class.")
    return rule


def build_rule(
    name: str, kwargs: Mapping[str, Any], known: Mapping[str, Any], key: str, kwargs_key: str | None = None
) -> Any:
    """The rule itself: a function as it is, a class instantiated with `kwargs`, which stand under `kwargs_key` or `key_kwargs`.

    Raises:
        `InputError`: as [`named_rule`], or the arguments are not those that the rule takes.
    """
    rule, kwargs_key = named_rule(name, known, key), kwargs_key or f"{key}_kwargs"
    if not isinstance(rule, type):
        if kwargs:
            raise InputError(f"{kwargs_key}: {name} is a function and takes none; make it a class.")
        return rule
    return build(rule, kwargs, kwargs_key)


def build(cls: type, kwargs: Mapping[str, Any], key: str) -> Any:
    """`cls(**kwargs)`, with the key of the recipe in every complaint.

    Raises:
        `InputError`: an argument is unknown or missing, or the class refuses its value.
    """
    signature = inspect.signature(cls)
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "none"
        unknown = [name for name in kwargs if name not in signature.parameters]
        free = [name for name in signature.parameters if name not in kwargs]
        near = [near[0] for name in unknown if (near := get_close_matches(name, free, n=1))]
        meant = f" Did you mean {near[0]}?" if near else ""
        raise InputError(f"{key}: {error}. {cls.__name__} takes: {takes}.{meant}") from error
    try:
        return cls(**kwargs)
    except InputError as error:
        raise InputError(f"{key}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"{key}: {_wrong_kind(signature, kwargs) or error}") from error


def _wrong_kind(signature: inspect.Signature, kwargs: Mapping[str, Any]) -> str | None:
    """The first argument that is not what its annotation says, for what Python's own complaint leaves unsaid."""
    kinds = {
        float: (Real, "a number"),
        int: (int, "a whole number"),
        str: (str, "text"),
        bool: (bool, "true or false"),
    }
    for name, value in kwargs.items():
        kind = signature.parameters[name].annotation if name in signature.parameters else None
        if kind in (float, int, str, bool) and not isinstance(value, kinds[kind][0]):
            return f"{name} must be {kinds[kind][1]}, got {value!r}."
    return None


def as_dict(value: dict | str | None, key: str) -> dict[str, Any]:
    """A field that holds a dict, or JSON of one where it comes from a command line.

    Raises:
        `InputError`: it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InputError(f"{key} is not JSON: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{key} must map names to values, got {value!r}.")
    return value or {}
