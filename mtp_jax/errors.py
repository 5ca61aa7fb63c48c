"""The one exception a user may cause: the command line prints it as a single line and exits with 2."""


class UserError(ValueError):
    """Bad input. The message is one line that names the thing, its value and the remedy."""
