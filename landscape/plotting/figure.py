"""Figures with a caption, written to files."""

import io
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from landscape.errors import LandscapeError
from landscape.files import whole_file

_METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Metadata by suffix: no dates, so that a figure is always the same bytes."""


class LandscapeFigure(Figure):
    """Matplotlib figure that notebooks display without pyplot.

    A figure of pyplot stays in its global list until it is closed. This one is freed like any other object.

    Examples:
        >>> figure = LandscapeFigure(figsize=(2, 1))
        >>> axes = figure.subplots()
        >>> save_figure(figure, "empty.png")
    """

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF.

    The file is written atomically: it is complete, or it is not changed. Equal figures give equal bytes.

    Args:
        figure: Matplotlib figure.
        path: File with the suffix ``.png`` (200 dots per inch), ``.svg`` or ``.pdf``. Missing folders are created.

    Raises:
        LandscapeError: The suffix is another one, or the file cannot be written.

    Examples:
        >>> save_figure(LandscapeFigure(figsize=(2, 1)), "figures/empty.svg")
        >>> Path("figures/empty.svg").read_text()[:5]
        '<?xml'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _METADATA:
        raise LandscapeError(f"path={str(path)!r}: unknown format. Use a name that ends in {', '.join(_METADATA)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file, mpl.rc_context({"svg.hashsalt": "landscape"}):
            figure.savefig(file, format=suffix[1:], dpi=200, metadata=_METADATA[suffix])
    except OSError as error:
        raise LandscapeError(f"path={str(path)!r}: cannot be written ({error.strerror}). Use another path.") from error


def footnote(figure: Figure, text: str, width: int = 134) -> None:
    """Add text below the panels of a figure.

    Args:
        figure: Matplotlib figure with the layout ``"constrained"``, which makes room for the text.
        text: Text, broken into lines.
        width: Maximum number of characters in a line; 134 fill 8 inches.
    """
    lines = textwrap.fill(text, width)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize="small", color="0.3", parse_math=False)
