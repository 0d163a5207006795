"""Check values of a recipe against the fields of a dataclass, and build it."""

import dataclasses
import difflib
import enum
import functools
import json
import math
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from hf_delta.errors import InputError
from hf_delta.recipe.launch import of_launches
from hf_delta.recipe.source import Node


T = TypeVar("T")


# Fields that take more than upstream declares: TRL documents true and false for this one.
_WIDER = {"scale_rewards": bool | str}


@functools.lru_cache
def type_hints(cls: type) -> dict[str, Any]:
    """Types of the fields of a dataclass that can be given to its constructor."""
    hints = typing.get_type_hints(cls)
    return {field.name: _WIDER.get(field.name, hints[field.name]) for field in dataclasses.fields(cls) if field.init}


def build(cls: type[T], nodes: Mapping[str, Node], source: str, preset: Mapping[str, Any] | None = None) -> T:
    """Check the types of `nodes`, then construct `cls` with them and with `preset`.

    Raises:
        `InputError`: a value has the wrong type (with its place), or the constructor refuses the values.
    """
    hints = type_hints(cls)
    metadata = {field.name: field.metadata for field in dataclasses.fields(cls)}
    values = {key: check(key, node, hints[key], metadata[key].get("choices")) for key, node in nodes.items()}
    try:
        return cls(**{**(preset or {}), **values})
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InputError(f"{source}: {of_launches(str(error) or type(error).__name__)}") from error
    except OSError as error:
        raise InputError(f"{source}: {error.filename} cannot be read ({error.strerror}).") from error
    except Exception as error:
        # Whatever a configuration of TRL, PEFT or transformers trips over is a value that it was given.
        raise InputError(
            f"{source}: {cls.__name__} does not take these values ({type(error).__name__}: {error})."
        ) from error


def check(key: str, node: Node, hint: Any, choices: Iterable[Any] | None = None) -> Any:
    """The value of a node, converted to the type of its field.

    Whole numbers become floats where a float is wanted, and a lone value a list of one where a list is wanted; nothing
    else is converted, so `true` is never the number 1.

    Raises:
        `InputError`: wrong type or not one of the choices.
    """
    _refuse_unknown_keys(key, node, hint)
    readings = [node.plain(), [node.plain()]]
    if node.text is not None:
        # `--run_name 123` and `--system_prompt "Think: first"` are text, whatever YAML makes of them.
        readings[1:1] = [node.text]
    accepted = [value for reading in readings for value in _validated(reading, hint)]
    if not accepted:
        remedy = " Write it without quotes." if _is_quoted_number(node.value, hint) else ""
        raise InputError(f"{node.where}: {key} must be {describe(hint)}, got {_got(node)}.{remedy}")
    value = accepted[0]
    known = _known_words(hint, choices)
    if known is not None and value is not None and not isinstance(value, (bool, enum.Enum)) and value not in known:
        raise InputError(f"{node.where}: {key} is {_got(node)}, which it does not take{suggest(value, known, most=3)}")
    return value


def _is_quoted_number(value: Any, hint: Any) -> bool:
    if not isinstance(value, str) or not {int, float} & set(_parts(hint)):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def _refuse_unknown_keys(key: str, node: Node, hint: Any) -> None:
    """A field that is itself a dataclass: pydantic would drop keys it does not know."""
    classes = [part for part in _parts(hint) if dataclasses.is_dataclass(part)]
    if dict in _parts(hint) or not isinstance(node.value, dict) or not classes:
        return
    known = set().union(*(type_hints(cls) for cls in classes))
    for name, child in node.value.items():
        if name not in known:
            raise InputError(f"{child.where}: {key} has no key {name!r}{suggest(name, known)}")


def _validated(value: Any, hint: Any) -> list[Any]:
    """The converted value in a list, or an empty list if it has another type."""
    try:
        # JSON mode is strict about scalars and still turns blocks of keys into the dataclasses of PEFT's fields.
        return [_adapter(hint).validate_json(json.dumps(value, default=str), strict=True)]
    except ValidationError:
        return []


@functools.lru_cache
def _adapter(hint: Any) -> TypeAdapter:
    hint = _without_open_literals(hint)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        # A dataclass brings its own pydantic configuration.
        return TypeAdapter(hint)


def _without_open_literals(hint: Any) -> Any:
    """`Literal["pissa_niter_[number of iters]"]` documents a pattern, which no value equals: any text goes there."""
    if _is_union(hint):
        return functools.reduce(operator.or_, map(_without_open_literals, typing.get_args(hint)))
    if typing.get_origin(hint) is Literal and any("[" in str(option) for option in typing.get_args(hint)):
        return str
    return hint


def _known_words(hint: Any, choices: Iterable[Any] | None) -> list[Any] | None:
    """The words a field takes, if it takes only some: its `choices`, or the members of an `Enum | str`."""
    if choices is not None:
        return list(choices)
    parts = _parts(hint)
    members = [part for part in parts if isinstance(part, type) and issubclass(part, enum.Enum)]
    if not members or not set(parts) <= {*members, str, type(None)}:
        return None
    return [member.value for part in members for member in part]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if _is_union(hint) else (hint,)


_ONE = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_MANY = {**_ONE, int: "whole numbers", float: "numbers", str: "texts"}


def describe(hint: Any, many: bool = False) -> str:
    """A type as a person would say it, of one value or of `many`."""
    if _is_union(hint):
        return " or ".join(dict.fromkeys(describe(part, many) for part in typing.get_args(hint)))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {_listed(args)}"
    if (origin or hint) in (list, tuple):
        return ("lists" if many else "a list") + (f" of {describe(args[0], many=True)}" if args else "")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {_listed(member.value for member in hint)}"
    if hint in _ONE:
        return (_MANY if many else _ONE)[hint]
    if (origin or hint) is dict or dataclasses.is_dataclass(hint):
        return "blocks of keys" if many else "a block of keys"
    return str(getattr(hint, "__name__", hint))


def _got(node: Node) -> str:
    value = node.plain()
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return f"the text {value!r}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return f"the {'list' if isinstance(value, list) else 'block'} {value}"


def _listed(options: Iterable[Any]) -> str:
    return ", ".join(str(option) for option in options)


def suggest(word: Any, known: Iterable[Any], most: int = 1) -> str:
    """End of a message: the closest known words, or all of them where none is close and they are few."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(word), known, n=most, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; there are {', '.join(known)}." if len(known) <= 60 else "."
