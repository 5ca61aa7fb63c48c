"""The exception for bad input. The command line prints its message as one line and exits with status 2."""


class UserError(ValueError):
    """Bad input. The message is one line that names the setting or file, its value and the remedy."""
