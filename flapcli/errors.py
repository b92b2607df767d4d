"""The errors that users see: one line each, with the exit code of the contract."""


class FlapError(Exception):
    """A failure: what is wrong, which file or option, what to do. Exit code 1."""

    exit_code = 1


class UsageError(FlapError):
    """Misuse, decided by the options alone. Exit code 2."""

    exit_code = 2


class UnreachableError(UsageError):
    """More is to be removed than can go; less of it may do, so that a search turns back here."""
