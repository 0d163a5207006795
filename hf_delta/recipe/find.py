"""Where recipes and accelerate configurations lie: a path, the checkout, or the installed package."""

import difflib
from pathlib import Path

from hf_delta.errors import InputError
from hf_delta.paths import expanded


_PACKAGE = Path(__file__).resolve().parent.parent


def shipped(directory: str) -> Path:
    """`recipes` or `accelerate_configs`: inside the package when installed from a wheel, beside it in a checkout."""
    installed = _PACKAGE / directory
    return installed if installed.is_dir() else _PACKAGE.parent / directory


def list_recipes() -> dict[str, str]:
    """Names of the shipped recipes, such as `rl/delta_l`, and the comment on their first line."""
    root = shipped("recipes")
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}
    return {name: _first_comment(found[name]) for name in sorted(found)}


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.lstrip("# ") if line.startswith("#") else ""


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by name; `recipes/rl/delta_l.yaml` also works where only the package is.

    Raises:
        `InputError`: there is no such file and no such name.
    """
    path = expanded(name)
    if path.is_file():
        return path
    root = shipped("recipes")
    stem = name.removeprefix("recipes/").removesuffix(".yaml")
    if (root / f"{stem}.yaml").is_file():
        return root / f"{stem}.yaml"
    names = list(list_recipes())
    close = difflib.get_close_matches(stem, names, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(names)}."
    raise InputError(f"{name}: no such file, and no recipe of that name. {hint}")
