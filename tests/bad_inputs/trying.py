"""Tries a row of the table in this process: status, what was said, and what changed in the directory."""

import contextlib
import io
import os
import re
import sys
import zlib
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
        error (`str`, *optional*): The last line, without the `error: ` that it begins with; `None` if another line begins so
            too, or the last one does not.
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
    before = _trees(folder, world)
    said = io.StringIO()
    with _inside(folder), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        with _nobody() if case.unprivileged else contextlib.nullcontext():
            try:
                status = main(list(case.argv))
            except SystemExit as end:
                status = end.code
    after = _trees(folder, world)
    stderr = said.getvalue()
    lines = stderr.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    error = None
    if len(errors) == 1 and lines[-1] == f"error: {errors[0]}":
        error = (
            errors[0]
            .replace(str(world.playground.resolve()), "playground")
            .replace(f"{folder}/", "")
            .replace(str(folder), ".")
        )
    return Outcome(
        status, error, stderr, sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    )


def _trees(folder: Path, world: World) -> dict[str, tuple]:
    # All rows share the playground, which is too large to be read for each.
    return {**tree(folder), **tree(world.playground, bytes_too=False)}


def tree(folder: Path, bytes_too: bool = True) -> dict[str, tuple]:
    """Mode, time of the last change and bytes of every file below a directory; of others what they are, and where links lead."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        if path.is_symlink():
            found[str(path)] = ("link", os.readlink(path))
        elif path.is_file():
            content = zlib.crc32(path.read_bytes()) if bytes_too and os.access(path, os.R_OK) else stat.st_size
            found[str(path)] = (stat.st_mode, stat.st_mtime_ns, content)
        else:
            found[str(path)] = (stat.st_mode,)
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
