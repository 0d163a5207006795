"""Paths that users write: `~`, and whether something can be written there, asked before anything is computed."""

import os
from pathlib import Path

from hf_delta.errors import InputError


def expanded(path: str | Path) -> Path:
    """A path with `~` replaced; that of a user whom this machine does not have stays as it is, and is not found."""
    return Path(os.path.expanduser(path))


def check_writable(path: str | Path, key: str, *, directory: bool) -> None:
    """See that a file or directory could be made or written; makes nothing.

    Args:
        path (`str` or `Path`): What is to be written; it need not exist, nor the directories above it.
        key (`str`): Key or option that the path came from, for the message.
        directory (`bool`): Whether it is a directory.

    Raises:
        `InputError`: it cannot, and because of what.
    """
    path = Path(path)
    if path.parts and path.parts[0].startswith("~"):
        raise InputError(f"{key}: {path} cannot be written: there is no user {path.parts[0][1:]!r} here.")
    if os.path.islink(path) and not os.path.exists(path):
        raise InputError(f"{key}: {path} cannot be written: it is a link to what is not there.")
    # Those of os.path say no where those of pathlib raise: in a directory that one may not look into.
    if not directory and os.path.isdir(path):
        raise InputError(f"{key}: {path} is a directory; write the name of a file.")
    if not directory and os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f"{key}: {path} cannot be written: it is a file that you may not write to.")
    # As it was written: the directories above a relative path need not be for everyone.
    start = path if directory else path.parent
    parent = next(above for above in (start, *start.parents) if os.path.lexists(above))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{key}: {path} cannot be written: {parent} is no directory that you may write to.")
