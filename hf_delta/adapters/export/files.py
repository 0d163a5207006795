"""Directories that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_delta.errors import InputError
from hf_delta.paths import check_writable, expanded


def check_new(out: str | Path) -> Path:
    """
    Raises:
        `InputError`: there is something in `out`, or it cannot be written.
    """
    out = expanded(out)
    check_writable(out, "out", directory=True)
    out = out.absolute()
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty: give another directory, or empty it. Nothing was written.")
    return out


@contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the block ends well, and is deleted when it does not.

    Raises:
        `InputError`: there is something in `out`, or it cannot be written.
    """
    out = check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}.") from error
    try:
        yield partial
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
