"""Exceptions that a caller may handle."""


class LandscapeError(ValueError):
    """Invalid value; the message names value, constraint and remedy.

    The command line prints the message in one line and exits with code 2. Any other exception is a bug.

    Examples:
        >>> from landscape import make_norm
        >>> make_norm("ghost", groups=0)
        Traceback (most recent call last):
        landscape.errors.LandscapeError: groups=0: must be an integer of at least 1.
    """


class ProbeDeferred(LandscapeError):
    """This update cannot be probed, but later updates can."""


class TrainingInterrupted(Exception):
    """Training was stopped between two updates, as requested."""


class MissingExtraError(LandscapeError):
    """Missing optional dependency; the message names its extra."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency. Run: pip install 'landscape-probe[{extra}]'")
