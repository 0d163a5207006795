"""A disk that is full."""

import errno


class NoRoomError(OSError):
    """Something could not be written because a disk is full; the message says what, what is left, and what to do."""


_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

# Of libraries that write without Python: safetensors has the system's number in its message, and torch's zip files say that
# they could not write, or are not where they thought.
_SAID = (
    *(f"os error {number}" for number in _ERRORS),
    "No space left on device",
    "PytorchStreamWriter failed writing",
    "iostream error",
    "unexpected pos",
)


def finds_no_room(error: BaseException) -> str | None:
    """The reason in one line if an exception, or one that led to it, says that there is no room; else `None`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, NoRoomError):
            return str(error)
        lines = str(error).strip().splitlines()
        if getattr(error, "errno", None) in _ERRORS or any(said in line for line in lines for said in _SAID):
            return next((line for line in lines if any(said in line for said in _SAID)), lines[0] if lines else "")
        error = error.__cause__ or error.__context__
    return None
