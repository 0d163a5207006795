"""What a run says, on the main process only."""

import errno
import os
import sys
import time

from rich.console import Console
from rich.markup import escape

from hf_delta.disk import NoRoomError
from hf_delta.errors import InputError


_PATIENCE = 20  # seconds


class OneProcessError(InputError):
    """Bad input that one process of several met, in its share of the rows for instance, and that only it can report."""


def is_main_process() -> bool:
    """Known from the launcher's environment, before torch is imported."""
    return os.environ.get("RANK", "0") == "0"


def console(stderr: bool = False) -> Console:
    """A console that is silent on all processes but the main one."""
    return Console(stderr=stderr, quiet=not is_main_process(), highlight=False, soft_wrap=True)


def announce(text: str) -> None:
    """One line that says which stage begins."""
    # The progress bars are on stderr; on one stream the lines keep their order.
    console(stderr=True).print(f"[bold]>[/bold] {escape(text)}")


def unusable_path(error: BaseException) -> InputError | None:
    """What to say of a file or directory that nobody or not everybody can use, wherever that was noticed; else `None`."""
    if isinstance(error, PermissionError):
        return InputError(
            f"{error.filename}: you may not read or write this. Change its permissions, or choose another."
        )
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        return InputError(
            f"{error.filename!s:.40}…: the name of a file or directory is too long. Write a shorter one."
        )
    if getattr(error, "errno", None) == errno.ELOOP:
        return InputError(f"{error.filename}: a link that leads to itself. Remove it, or choose another path.")
    return None


def no_room(error: Exception, reason: str, then: str) -> InputError:
    """What to say of a disk that is full, wherever that was noticed; each process for itself."""
    if isinstance(error, NoRoomError):
        return OneProcessError(str(error))
    where = getattr(error, "filename", None) or "A file could not be written"
    return OneProcessError(f"{where}: there is no room on the disk ({reason}). Make room; {then}.")


def fail(error: InputError, status: int = 2) -> int:
    """Report an error on one line, once where every process met it, and return the exit status for it."""
    said = str(error)
    if not (is_main_process() or isinstance(error, OneProcessError)):
        # A launcher kills the others when one process ends, and the main one, which is to report, may be slower. Whoever is
        # still there after this met something that the main process did not.
        time.sleep(_PATIENCE)
        said = f"process {os.environ['RANK']}: {said}"
    # Reasons that other packages give have several lines.
    lines = [line.strip() for line in said.splitlines()]
    sys.stderr.write(f"error: {' '.join(filter(None, lines))}\n")
    return status
