"""Figures with a caption, in one style, written to files."""

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib import font_manager
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.style import context as style_context
from matplotlib.text import Text

from landscape.errors import LandscapeError
from landscape.files import whole_file

_METADATA = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Metadata by suffix: no dates, so that a figure is always the same bytes."""
_FONTS = ("font.family", "font.serif", "font.sans-serif", "font.monospace", "font.cursive", "font.fantasy")
_KEPT = (
    *("figure.dpi", "savefig.dpi", "svg.fonttype", "svg.hashsalt", "pdf.fonttype", "ps.fonttype"),
    "axes.formatter.use_mathtext",
)
"""Settings of the user that change neither the layout nor the colours."""
_LAST_RESORT = "Last Resort"
"""Font of matplotlib with a box for every character."""


@contextmanager
def figure_style() -> Iterator[None]:
    """Set the package's style, and restore the user's.

    Of the user's ``matplotlib.rcParams`` only the fonts (``font.family`` and the lists of families, if they are not the
    defaults), the resolution (``figure.dpi``, ``savefig.dpi``) and the way in which files hold text (``pdf.fonttype``,
    ...) count. All others, such as those of dark or small styles or ``text.usetex``, are replaced for the time of the
    context.

    Examples:
        >>> with mpl.rc_context({"text.usetex": True, "axes.facecolor": "black"}), figure_style():
        ...     mpl.rcParams["text.usetex"], mpl.rcParams["axes.facecolor"]
        (False, 'white')
    """
    user: dict[str, Any] = {**mpl.rcParams}
    default: dict[str, Any] = {**mpl.rcParamsDefault}
    kept = {name: user[name] for name in _KEPT}
    kept |= {name: user[name] for name in _FONTS if user[name] != default[name]}
    with style_context([{**sns.axes_style("ticks"), **sns.plotting_context("paper"), **kept}], after_reset=True):
        yield


class LandscapeFigure(Figure):
    """Matplotlib figure in the style of this package, on white.

    It is drawn and saved in `figure_style`, whatever the ``rcParams`` are then. Characters that its font lacks are
    drawn in another installed font that has them; if there is none, one warning names them. Notebooks display it
    without pyplot: a figure of pyplot stays in its global list until it is closed, but this one is freed like any
    other object.

    Examples:
        >>> with figure_style():
        ...     figure = LandscapeFigure(figsize=(2, 1))
        ...     axes = figure.subplots()
        >>> save_figure(figure, "empty.png")
    """

    _lacking: frozenset[str] = frozenset()
    """Characters without a font that a warning has named."""

    def draw(self, renderer: RendererBase) -> None:
        """Draw the figure in its style."""
        # Ticks are made while drawing, and constrained layout measures text then.
        with figure_style(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from")
            lacking = frozenset(use_fallback_fonts(self.findobj(Text)))
            super().draw(renderer)
        if new := lacking - self._lacking:
            self._lacking |= new
            warnings.warn(
                f"No installed font has the characters {' '.join(sorted(new)[:20])}: boxes are drawn in their place. "
                "Install one, such as Noto Sans CJK for Chinese, or set matplotlib.rcParams['font.family'] to one.",
                stacklevel=2,
            )

    def savefig(self, fname: Any, **options: Any) -> None:
        """Write the figure in its style, as ``Figure.savefig``."""
        with figure_style():
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def use_fallback_fonts(texts: Sequence[Text]) -> set[str]:
    """Add font families for the characters that texts lack.

    Args:
        texts: Artists with text, changed in place.

    Returns:
        Characters that no installed font has.

    Examples:
        >>> use_fallback_fonts([text := Text(text="ж", fontfamily="cmr10")])
        set()
        >>> text.get_fontfamily()
        ['cmr10', 'DejaVu Sans']
    """
    unknown: set[str] = set()
    for text in texts:
        characters = {char for char in text.get_text() if not char.isascii()}
        if not characters:
            continue
        families = list(text.get_fontfamily())
        for family in families:
            characters -= _characters(font_manager.findfont(font_manager.FontProperties(family=[family])))
        while characters and (best := _family_with(frozenset(characters))):
            families.append(best[0])
            characters -= best[1]
        text.set_fontfamily(families)
        unknown |= characters
    return unknown


@lru_cache(maxsize=64)
def _family_with(characters: frozenset[str]) -> tuple[str, frozenset[str]] | None:
    """Return the family that has most of some characters.

    DejaVu Sans, which comes with matplotlib, is preferred, then the first by name.
    """
    fonts = {font.name: font.fname for font in font_manager.fontManager.ttflist if font.style == "normal"}
    names = sorted((name for name in fonts if _LAST_RESORT not in name), key=lambda name: (name != "DejaVu Sans", name))
    found = {name: characters & _characters(fonts[name]) for name in names}
    best = max(found, key=lambda name: len(found[name]), default=None)
    return (best, found[best]) if best and found[best] else None


@lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[str]:
    if _LAST_RESORT.replace(" ", "") in path:
        return frozenset()
    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))


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
