"""What bad input leaves behind: nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_delta.data import CACHE
from hf_delta.errors import InputError
from hf_delta.preference.snapshots import SNAPSHOTS
from hf_delta.run.console import is_main_process
from hf_delta.run.evaluation import BEFORE


MANIFEST = "run.json"

# What a run leaves that ended before its first checkpoint, for example at a wrong reward: nothing that would be missed.
BEFORE_TRAINING = {MANIFEST, BEFORE, SNAPSHOTS}


@contextmanager
def undoing(out: Path) -> Iterator[None]:
    """Inside, bad input that ends a run before its first checkpoint takes back what the run has written to `out`.

    What was there before is there again, except for an earlier run that `overwrite_output_dir` has deleted. A run that has come
    to a checkpoint keeps everything.
    """
    there = _entries(out)
    kept = {
        path: (path.read_bytes(), path.stat())
        for path in there
        if path.name in BEFORE_TRAINING and path.parent == out and path.is_file()
    }
    made = [path for path in (out, *out.parents) if not os.path.exists(path)]
    try:
        yield
    except InputError:
        if is_main_process():
            _undo(out, there, kept, made)
        raise


def _entries(out: Path) -> set[Path]:
    """What is in a run, and below its cache of rows."""
    return {*out.glob("*"), *(out / CACHE).rglob("*")}


def _undo(out: Path, there: set[Path], kept: dict[Path, tuple[bytes, os.stat_result]], made: list[Path]) -> None:
    new = _entries(out) - there
    if any(path.relative_to(out).parts[0] not in {*BEFORE_TRAINING, CACHE} for path in new):
        return
    for path in sorted(new):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for path, (content, stat) in kept.items():
        if path.exists() and path.read_bytes() != content:
            path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
