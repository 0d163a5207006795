"""The one error that users are meant to read."""


class InputError(ValueError):
    """Something a user wrote cannot be used; the message says what is wrong, where, and what to write instead.

    Commands print it without a traceback and exit with status 2.
    """
