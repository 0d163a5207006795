"""A row of the table of bad inputs: what is written to an empty directory, the command given there, and what it says."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tests.running import keys


# Stands for any text in an expected message: what other packages say, lists that grow, numbers of processes.
ANY = "…"


@dataclass(frozen=True)
class Case:
    """
    One bad input.

    Args:
        id (`str`): Name of the row.
        given (`str`): What is wrong, as Markdown, for the page.
        argv (`tuple[str, ...]`): Words after `hf-delta`.
        says (`str`): The line on stderr without `error: `; `…` stands for any text.
        files (`dict[str, Any]`): What is written first, see [`write`].
        unprivileged (`bool`): Whether it takes a user who is not root.
        slow (`bool`): Whether it is tried in the slow tier only, because a row of the fast tier takes the same way.
    """

    id: str
    given: str
    argv: tuple[str, ...]
    says: str
    files: Mapping[str, Any] = field(default_factory=dict)
    unprivileged: bool = False
    slow: bool = False


def slow(cases: Sequence[Case], but: Sequence[str] = ()) -> list[Case]:
    """Rows for the slow tier, but for those named, which stand for all of them in the fast one."""
    assert set(but) <= {case.id for case in cases}
    return [replace(case, slow=case.id not in but) for case in cases]


def write(folder: Path, files: Mapping[str, Any], world: Any) -> None:
    """Write files: text and bytes as they are, a list as JSON lines, a dict as YAML or JSON; a function does it itself."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path, world)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        elif isinstance(content, Mapping):
            is_json = path.suffix == ".json"
            path.write_text(json.dumps(content) if is_json else yaml.safe_dump(dict(content), sort_keys=False))
        else:
            path.write_text(content)


def recipe(trainer: str, /, **changes: Any) -> dict[str, Any]:
    """Keys of a short run on the playground; a change to `None` removes the key."""
    found = {**keys(trainer, "playground", "out"), **changes}
    return {key: value for key, value in found.items() if value is not None}


def run(
    id: str,
    trainer: str,
    changes: Mapping[str, Any],
    says: str,
    *flags: str,
    given: str | None = None,
    files: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> Case:
    """A recipe that is good but for `changes`, which are what the page shows if nothing else is `given`; and keys `beside`."""
    shown = ", ".join(
        [*(_as_yaml(key, value) for key, value in changes.items()), *([f"`{' '.join(flags)}`"] * bool(flags))]
    )
    return Case(
        id=f"{trainer}-{id}",
        given=f"{trainer}: {given or shown}",
        argv=("run", "recipe.yaml", *flags),
        says=says,
        files={"recipe.yaml": recipe(trainer, **{**changes, **(beside or {})}), **(files or {})},
    )


def text(id: str, content: str | bytes, says: str, given: str) -> Case:
    """A recipe whose text is wrong."""
    return Case(id=id, given=given, argv=("run", "recipe.yaml"), says=says, files={"recipe.yaml": content})


def rows(
    id: str,
    trainer: str,
    lines: Sequence[Any] | str | bytes,
    says: str,
    given: str,
    name: str = "rows.jsonl",
    **changes: Any,
) -> Case:
    """A recipe that trains on `lines`: rows, or the content of the file."""
    return run(id, trainer, {"train_file": name, **changes}, says, given=given, files={name: lines})


def command(
    id: str, argv: str, says: str, given: str | None = None, files: Mapping[str, Any] | None = None, **kwargs: Any
) -> Case:
    """A command line, of words without spaces."""
    return Case(id, given or f"`hf-delta {argv}`", tuple(argv.split()), says, files or {}, **kwargs)


def _as_yaml(key: str, value: Any) -> str:
    if value is None:
        return f"no `{key}`"
    return "`" + yaml.safe_dump({key: value}, default_flow_style=True, width=1000).strip()[1:-1] + "`"


def copied(name: str, change: Callable[[Path, Any], None] | None = None) -> Callable[[Path, Any], None]:
    """Makes a copy of a directory of the [`World`], changed."""

    def make(path: Path, world: Any) -> None:
        shutil.copytree(getattr(world, name), path)
        if change is not None:
            change(path, world)

    return make
