"""Reward functions by name, and what they need from the data."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from hf_delta.errors import InputError
from hf_delta.imports import load_object
from hf_delta.recipe.fields import suggest
from hf_delta.rl.rewards import NAMED_REWARDS


# What TRL passes to every reward function besides the columns of the dataset.
PASSED_BY_TRL = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)

_NEED_MATH_VERIFY = ("accuracy_reward", "reasoning_accuracy_reward", "get_cosine_scaled_reward")


def resolve_reward(entry: str | dict[str, dict[str, Any]], key: str = "reward_funcs") -> Callable:
    """The function that an entry of `reward_funcs:` or `evaluate_reward:` names.

    Args:
        entry (`str` or `dict`): A name in `trl.rewards`, `playground_reward`, a dotted path; or
            `{name: {argument: value}}` for a function that is made by calling what the name stands for.
        key (`str`, *optional*): The key of the recipe, for messages.

    Raises:
        `InputError`: nothing of that name, not callable, arguments that it does not take or that make it raise, or
                `math_verify` is needed and missing.
    """
    name, arguments = _split(entry, key)
    found = _find(name, key)
    if not callable(found):
        raise InputError(f"{key}: {name} is not a function.")
    try:
        inspect.signature(found)
    except (ValueError, TypeError) as error:
        raise InputError(f"{key}: {name} does not say which parameters it has. Write a function.") from error
    makes_functions = name.startswith("get_") or inspect.isclass(found)
    if arguments is None and makes_functions:
        raise InputError(f"{key}: {name} takes arguments; write {{{name}: {{{_required_text(found)}}}}}.")
    if arguments is None:
        return found
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise InputError(f"{key}: {name}: {error}; it takes ({_required_text(found)}).") from error
    try:
        made = found(**arguments)
    except (Exception, SystemExit) as error:
        raise InputError(f"{key}: {name}{arguments} raised {type(error).__name__}: {error}") from error
    if not callable(made):
        raise InputError(f"{key}: {name}{arguments} is not a function; write the name alone.")
    return made


def _split(entry: str | dict[str, dict[str, Any]], key: str) -> tuple[str, dict[str, Any] | None]:
    if isinstance(entry, str):
        return entry, None
    if len(entry) != 1:
        raise InputError(f"{key}: {entry} must have one name, as in {{name: {{argument: value}}}}.")
    return next(iter(entry.items()))


def _find(name: str, key: str) -> Any:
    from trl import rewards

    in_trl = [n for n in rewards.__all__ if callable(getattr(rewards, n))]
    if name in _NEED_MATH_VERIFY and importlib.util.find_spec("math_verify") is None:
        raise InputError(f"{key}: {name} needs math_verify, which is not installed: pip install 'hf_delta[math]'.")
    if name in in_trl:
        return getattr(rewards, name)
    if name in NAMED_REWARDS:
        return load_object(NAMED_REWARDS[name], key)
    if "." in name:
        return load_object(name, key)
    raise InputError(f"{key}: no reward function {name!r}{suggest(name, [*in_trl, *NAMED_REWARDS])}")


def _required_text(function: Callable) -> str:
    return ", ".join(f"{name}: …" for name in inspect.signature(function).parameters)


def columns_needed(function: Callable, columns: Sequence[str]) -> list[str]:
    """The columns that a reward function cannot do without.

    Raises:
        `InputError`: the dataset lacks one of them, or the function takes no `**kwargs` and lacks a parameter for
        something that TRL passes.
    """
    name = getattr(function, "__name__", type(function).__name__)
    parameters = inspect.signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = [p.name for p in parameters if p.name in named and p.default is p.empty and p.name not in PASSED_BY_TRL]
    missing = [column for column in required if column not in columns]
    if missing:
        raise InputError(
            f"The reward function {name} needs the column {missing[0]!r}, and the dataset has {', '.join(columns)}. "
            f"Map one to it: dataset_columns: {{{missing[0]}: <its name in the dataset>}}."
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        always = {*PASSED_BY_TRL, *columns} - {"prompt", "environments"}
        refused = sorted(always - named)
        if refused:
            raise InputError(
                f"The reward function {name} has no parameter for {', '.join(refused)}, which TRL passes: add **kwargs "
                "to its parameters."
            )
    return required
