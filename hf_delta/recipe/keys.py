"""The keys that a recipe can have, for people to read."""

import dataclasses

from hf_delta.recipe.fields import describe, type_hints
from hf_delta.recipe.find import find_recipe
from hf_delta.recipe.load import TRAINERS, key_owners, trainer_name
from hf_delta.recipe.source import read_recipe


def key_groups(trainer_or_recipe: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """Key, type, default and meaning of every key, by the class that it is a field of.

    Args:
        trainer_or_recipe (`str`): `sft`, `dpo`, `grpo`, or a recipe, by path or name.

    Raises:
        `InputError`: there is no such trainer or recipe.
    """
    trainer = trainer_or_recipe
    if trainer not in TRAINERS:
        path = find_recipe(trainer_or_recipe)
        trainer = trainer_name(read_recipe(path).get("trainer"), str(path))
    owners = key_owners(trainer)
    return {
        f"{cls.__module__}.{cls.__name__}": [
            (field.name, describe(type_hints(cls)[field.name]), _default(field), _meaning(field))
            for field in sorted(dataclasses.fields(cls), key=lambda field: field.name)
            if owners.get(field.name) is cls
        ]
        for cls in dict.fromkeys(owners.values())
    }


def _meaning(field: dataclasses.Field) -> str:
    return " ".join(str(field.metadata.get("help", "")).replace("%%", "%").split())


def _default(field: dataclasses.Field) -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    default = getattr(default, "value", default)
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)
