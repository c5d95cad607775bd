"""A figure with its caption, and how it is saved."""

import io
import textwrap
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from landscape.errors import LandscapeError
from landscape.files import whole_file

_UNDATED = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


class LandscapeFigure(Figure):
    """A figure that a notebook shows although it knows nothing of pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, SVG or PDF by the suffix of ``path``: whole or not at all, the same bytes every time.

    Raises:
        LandscapeError: Another suffix, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _UNDATED:
        raise LandscapeError(f"A picture cannot be written to {path}; give a name that ends in {', '.join(_UNDATED)}.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file, mpl.rc_context({"svg.hashsalt": "landscape"}):
            figure.savefig(file, format=suffix[1:], dpi=200, metadata=_UNDATED[suffix])
    except OSError as error:
        raise LandscapeError(f"{path} cannot be written: {error.strerror}. Give another path.") from error


def footnote(figure: Figure, text: str, width: int = 134) -> None:
    """Put text under a figure, in lines of at most ``width`` characters: 134 fill 8 inches."""
    lines = textwrap.fill(text, width)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize="small", color="0.3", parse_math=False)
