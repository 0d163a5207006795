"""The one error that users are meant to read, and what it says of errors in their code."""

import traceback
from pathlib import Path


class InputError(ValueError):
    """Something a user wrote cannot be used; the message says what is wrong, where, and what to write instead.

    Commands print it without a traceback and exit with status 2.
    """


def said_by(error: BaseException) -> str:
    """An exception that a function of a user raised: its class, its words, and where it was raised."""
    try:
        words = str(error)
    except Exception:  # of a class that somebody wrote
        words = ""
    said = ": ".join(filter(None, (type(error).__name__, words)))
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({Path(at.filename).name}, line {at.lineno})"
