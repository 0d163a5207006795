"""The `peft_config:` block of a recipe."""

import re
from typing import TYPE_CHECKING, Any

from hf_delta.errors import InputError
from hf_delta.recipe.fields import build, suggest, type_hints
from hf_delta.recipe.source import Node


if TYPE_CHECKING:
    from peft import PeftConfig

# Names that stand for another method with some fields set. Every name of PEFT itself is known without an entry.
PRESETS = {"dora": ("lora", {"use_dora": True})}

# What other tools and papers call fields of PEFT.
_ALIASES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


def build_peft_config(node: Node, source: str) -> "PeftConfig":
    """The configuration that a `peft_config:` block describes.

    Raises:
        `InputError`: no or unknown `method`, a key that the method does not have, or a value of the wrong type.
    """
    if not isinstance(node.value, dict) or "method" not in node.value:
        raise InputError(f"{node.where}: peft_config is a block with `method:` and the fields of that method.")
    settings = dict(node.value)
    method = settings.pop("method")
    name, preset = _resolve(method)
    config_class = _config_classes()[name]
    known = set(type_hints(config_class)) - {"peft_type"}
    for key, value in settings.items():
        if key not in known:
            hint = f"; write {_ALIASES[key]}." if _ALIASES.get(key) in known else suggest(key, known)
            raise InputError(f"{value.where}: peft_config has no key {key!r} for method {method.value}{hint}")
        if key in preset and value.value != preset[key]:
            raise InputError(f"{value.where}: method: {method.value} means {key}: {preset[key]}; leave it out.")
    if "task_type" in known:
        preset = {"task_type": "CAUSAL_LM", **preset}
    config = build(config_class, settings, f"{source}: peft_config", preset)
    _check_patterns(config, settings)
    return config


def check_virtual_tokens(config: "PeftConfig | None", source: str) -> None:
    """
    Raises:
        `InputError`: the method tunes a prompt, and nothing says how long it is, over which PEFT trips later.
    """
    if config is None or not config.is_prompt_learning or "num_virtual_tokens" not in type_hints(type(config)):
        return
    if not config.num_virtual_tokens:
        raise InputError(
            f"{source}: peft_config needs num_virtual_tokens for this method; write num_virtual_tokens: 8."
        )


def _check_patterns(config: "PeftConfig", settings: dict[str, Node]) -> None:
    """
    Raises:
        `InputError`: a pattern is no regular expression.
    """
    for key in ("target_modules", "exclude_modules"):
        pattern = getattr(config, key, None)
        if isinstance(pattern, str) and key in settings:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"{settings[key].where}: {key} is {pattern!r}, which is no regular expression ({error}). Write one, or a list "
                    "of names."
                ) from error


def _resolve(method: Node) -> tuple[str, dict[str, object]]:
    known = sorted({*_config_classes(), *PRESETS})
    name = str(method.value).lower().replace("-", "_")
    if name not in known:
        raise InputError(f"{method.where}: peft_config has no method {method.plain()!r}{suggest(name, known, most=3)}")
    return PRESETS.get(name, (name, {}))


def wants_fast_dora(values: dict[str, Any]) -> bool:
    """Whether a recipe asks for DoRA by its name; `method: lora` with `use_dora: true` is PEFT's own computation."""
    method = (values.get("peft_config") or {}).get("method", "")
    return str(method).lower() == "dora"


def _config_classes() -> dict[str, type]:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    from hf_delta.adapters import ADAPTERS

    ours = {name: config for name, (config, _) in ADAPTERS.items()}
    known = {
        kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        for kind in PeftType
        if kind in PEFT_TYPE_TO_CONFIG_MAPPING
    }
    return known | ours
