"""The one exception that the command line shows without a traceback."""


class UserError(ValueError):
    """A cause that the user can remove: a file, a folder, an argument.

    The message is one line that names the file or key, the cause and the remedy.
    """
