"""The one exception for what a user can cause."""


class InputError(ValueError):
    """Says what was required, what was received, and what to do about it.

    Raised wherever a config value, a file, a mesh or a checkpoint that the user supplied cannot be
    used. Launchers print its message without a traceback and exit with a non-zero status; any other
    exception is a bug and keeps its traceback.
    """
