"""Tries a row of the table in this process: status, what was said, and what changed in the directory."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_delta.cli import main
from tests.bad_inputs.case import ANY, Case, write
from tests.bad_inputs.world import World


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Args:
        status (`int`): Exit status.
        error (`str`, *optional*): The line that begins with `error: `, without that; `None` if there is not exactly one.
        stderr (`str`): All that was said.
        changed (`list[str]`): What appeared, disappeared or was changed below the directory.
    """

    status: int
    error: str | None
    stderr: str
    changed: list[str]


def outcome(folder: Path, case: Case, world: World) -> Outcome:
    """Write the files of a row to a directory, give its command there, and look."""
    (folder / "playground").symlink_to(world.playground)
    write(folder, case.files, world)
    if case.unprivileged:
        folder.chmod(0o777)
    before = {**tree(folder), **tree(world.playground)}
    said = io.StringIO()
    with _inside(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        with _nobody() if case.unprivileged else contextlib.nullcontext():
            try:
                status = main(list(case.argv))
            except SystemExit as end:
                status = end.code
    after = {**tree(folder), **tree(world.playground)}
    stderr = said.getvalue()
    errors = [line.removeprefix("error: ") for line in stderr.splitlines() if line.startswith("error: ")]
    error = None
    if len(errors) == 1:
        error = (
            errors[0]
            .replace(str(world.playground.resolve()), "playground")
            .replace(f"{folder}/", "")
            .replace(str(folder), ".")
        )
    return Outcome(
        status, error, stderr, sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    )


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file below a directory; of directories, that they are there."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path)] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return found


def matches(expected: str, found: str) -> bool:
    """Whether a message is the expected one, in which `…` stands for any text."""
    return re.fullmatch(".*".join(map(re.escape, expected.split(ANY))), found) is not None


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The working directory; modules that are imported from there are forgotten afterwards."""
    here, path, modules = os.getcwd(), [*sys.path], set(sys.modules)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]


@contextlib.contextmanager
def _nobody() -> Iterator[None]:
    """Without the powers of root, who may read and write everything."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
