"""Make any text safe to print in a terminal, a figure or a file; tables of text."""

import re
from collections.abc import Sequence

_PASSWORD = re.compile(r"(?<=:/)(/?[^/@?:]*):.*@", re.DOTALL)
_SECRET = re.compile(
    r"([?&][^=&]*(?:key|passw|secret|sig|token|credential(?!_kind))[^=&]*=)[^&]*", re.IGNORECASE | re.DOTALL
)
"""Value of an option that holds a secret: ``access_key``, ``client_secret``, ``X-Amz-Signature``, ``sig``, ..."""


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


def without_secrets(url: str) -> str:
    """Return the URL with passwords and secret options replaced.

    A password may hold any character, so everything up to the last ``@`` is replaced.

    Examples:
        >>> without_secrets("postgresql://me:p@ss/word@host/tuning")
        'postgresql://me:***@host/tuning'
        >>> without_secrets("gs://bucket/traces?scheme=https&access_token=ya29")
        'gs://bucket/traces?scheme=https&access_token=***'
    """
    return _SECRET.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown.

    Examples:
        >>> print(markdown_table(["norm", "range"], [["BatchNorm", "0.5"]]))
        | norm | range |
        | --- | --- |
        | BatchNorm | 0.5 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *lines])
