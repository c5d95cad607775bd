"""Text that others wrote, as it can be shown: in one line, without what no terminal, font or file takes."""


def printable(text: str) -> str:
    r"""The text with control characters and halves of a character written out, such as ``\x1b`` and ``\ud800``."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def short(text: str, most: int = 60) -> str:
    """The text, or its beginning where it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def one_line(text: str) -> str:
    """The text in one printable line."""
    return printable(" ".join(text.split()))
