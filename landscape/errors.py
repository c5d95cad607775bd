"""The one exception that means: the caller can mend this."""


class UserError(ValueError):
    """A mistake in what was asked for; the message says what was asked, what is allowed and what to do.

    The command line prints the message in one line and exits with code 2. Anything else that is raised is a bug.
    """
