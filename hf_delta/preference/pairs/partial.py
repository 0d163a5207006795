"""Answers of an unfinished run, kept batch by batch, so that a run that was killed goes on where it was."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_delta.errors import InputError
from hf_delta.preference.pairs.models import without_paths


SIDES = ("strong", "weak")


@dataclass(frozen=True)
class Response:
    """What one model answered to one prompt."""

    text: str  # without special tokens
    tokens: int  # of its own tokenizer, with the end-of-sequence token
    cut: bool  # whether max_new_tokens ended it


class Partial:
    """A file with what must be the same to go on in its first line, and one batch of answers on each other line.

    A batch is a line, so that it is there or not: what a kill leaves of a line is dropped, and the batches of the run that goes
    on are those of a run that was never killed.

    Attributes:
        responses (`dict[str, dict[int, Response]]`): For `strong` and `weak`, the answer to the prompt at each position.
        batch_sizes (`set[int]`): With which it was generated; batches of another size may differ by rounding.
    """

    def __init__(self, path: Path, header: dict[str, Any]):
        """
        Raises:
            InputError: the file belongs to something else than `header` says, or is damaged.
        """
        self.path = path
        self.responses: dict[str, dict[int, Response]] = {side: {} for side in SIDES}
        self.batch_sizes: set[int] = set()
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        whole = lines[:-1]
        if whole:
            self._check(whole[0], header)
            for number, line in enumerate(whole[1:], start=2):
                self._take(line, number)
        self._file = path.open("r+b" if path.exists() else "wb")
        self._file.truncate(sum(len(line) + 1 for line in whole))
        self._file.seek(0, os.SEEK_END)
        if not whole:
            self._write(header)

    def add(self, side: str, batch_size: int, positions: list[int], responses: list[Response]) -> None:
        """Keep the answers of a batch; they are on the disk when this returns."""
        rows = [[position, *astuple(response)] for position, response in zip(positions, responses, strict=True)]
        self._write({"side": side, "batch_size": batch_size, "rows": rows})
        self.responses[side].update(zip(positions, responses))
        self.batch_sizes.add(batch_size)

    def close(self) -> None:
        """Without a single answer, no file is left behind."""
        self._file.close()
        if not any(self.responses.values()):
            self.path.unlink(missing_ok=True)

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _check(self, line: bytes, header: dict[str, Any]) -> None:
        try:
            there = json.loads(line)
        except ValueError as error:
            raise self._damaged(1) from error
        if not isinstance(there, dict) or there.get("format") != header["format"]:
            raise InputError(
                f"{self.path} is no unfinished file of `hf-delta pairs`: move it, or choose another --out."
            )
        here, there = without_paths(header), without_paths(there)
        for key in dict.fromkeys([*here, *there]):
            if here.get(key) != there.get(key):
                raise InputError(
                    f"{self.path} was begun with another {key}: {_difference(there.get(key), here.get(key))}. Go on with that "
                    "one, or delete the file to start from the beginning."
                )

    def _take(self, line: bytes, number: int) -> None:
        try:
            batch = json.loads(line)
            self.responses[batch["side"]].update({row[0]: Response(*row[1:]) for row in batch["rows"]})
            self.batch_sizes.add(batch["batch_size"])
        except (ValueError, LookupError, TypeError) as error:
            raise self._damaged(number) from error

    def _damaged(self, number: int) -> InputError:
        return InputError(f"{self.path}, line {number} is damaged: delete the file to start from the beginning.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else writes to `path` inside.

    Raises:
        InputError: somebody does.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise InputError(f"{path} is being written by another process.") from error


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        parts = [
            f"{key} {there.get(key)!r} there and {here.get(key)!r} here"
            for key in dict.fromkeys([*there, *here])
            if there.get(key) != here.get(key)
        ]
        return ", ".join(parts)
    return f"{there!r} there and {here!r} here"
