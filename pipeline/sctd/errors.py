"""The exceptions that are meant for users, each is one line; and exit codes."""

EXIT_BAD_INPUT = 2
EXIT_FAILED = 74  # EX_IOERR of sysexits.h
EXIT_STOPPED = 75  # saved, and to be continued with --resume; EX_TEMPFAIL of sysexits.h
EXIT_INTERRUPTED = 130  # as shells say of SIGINT


class UserError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do. The CLI prints it and exits with 2."""


class RunError(RuntimeError):
    """Good input, but the machine failed: a full disk, ranks that do not come. Another attempt may mend it; exit 74."""


def one_line(error: BaseException) -> str:
    """The text of another library's exception, fit for a one-line message."""
    return " ".join(str(error).split())[:300] or type(error).__name__
