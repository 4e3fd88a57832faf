"""The one exception that is meant for users."""


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do. The CLI prints it and exits with 2."""
