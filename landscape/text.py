"""Make any text safe to print in a terminal, a figure or a file."""


def printable(text: str) -> str:
    r"""Return the text with control characters and lone surrogates escaped.

    Examples:
        >>> printable("\x1b[31mred")
        '\\x1b[31mred'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def short(text: str, limit: int = 60) -> str:
    """Return the text, cut to ``limit`` characters with an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def one_line(text: str) -> str:
    """Return the text in one printable line."""
    return printable(" ".join(text.split()))
