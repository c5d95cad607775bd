"""The exceptions that are meant for the caller: a mistake that can be mended, and the end that was asked for."""


class LandscapeError(ValueError):
    """A mistake in what was asked for; the message says what was asked, what is allowed and what to do.

    The command line prints the message in one line and exits with code 2. Anything else that is raised is a bug.
    """


class ProbeDeferred(LandscapeError):
    """This update cannot be probed, but later ones can."""


class TrainingInterrupted(Exception):
    """Training was asked to stop, between two updates."""


class MissingExtraError(LandscapeError):
    """An optional dependency is not installed; the message names its extra."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency. Run: pip install 'landscape-probe[{extra}]'")
