"""The exceptions that the command line shows without a traceback."""


class UserError(ValueError):
    """A cause that the user can remove: a file, a folder, an argument.

    The message is one line that names the file or key, the cause and the remedy.
    """


class RunError(UserError):
    """A cause that came up in the course of a run: one with another seed or normalization may be spared."""
