"""``landscape compare``: ratios between norms over seeds, and what may be concluded."""

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from landscape.names import MEASURES
from landscape.text import markdown_table

from .output import aligned, csv_text, echo, finite_or_none, report
from .params import Command, LocalPath, LocationType, options_under

if TYPE_CHECKING:  # pandas is slow to import, and --help does not need it.
    from landscape.analysis.compare import Comparison

WIDTH = 100
"""Maximum number of characters in a line of text."""
HEADINGS = ("phase", "norm", "ratio", "95 % interval", "seeds", "p (Holm)", "medians", "ratio of each seed")
SHOWN_SEEDS = 5
"""Maximum number of seeds whose ratios a line of a table shows."""

option = options_under("Comparison")


@click.command("compare", cls=Command)
@click.argument("paths", nargs=-1, required=True, type=LocationType())
@option(
    "--measure",
    "measures",
    type=click.Choice([*MEASURES]),
    multiple=True,
    default=("range", "lost_share"),
    show_default=True,
    metavar="NAME",
    help="Measure to compare, as for `landscape plot`. Repeatable.",
)
@option("--reference", default="batch", show_default=True, help="Norm that the others are divided by.")
@options_under("Output")(
    "--format",
    "style",
    type=click.Choice(["text", "md", "csv", "latex", "json"]),
    default="text",
    show_default=True,
    help="Format of the tables. csv and json have all columns.",
)
@options_under("Output")("--figure", type=LocalPath(), help="Forest plot: .png, .svg or .pdf.")
def command(
    paths: tuple[str | Path, ...], measures: tuple[str, ...], reference: str, style: str, figure: Path | None
) -> None:
    """Compare norms over seeds, also at equal loss.

    PATHS are folders of runs, folders that hold runs at any depth, or URLs such as s3://bucket/traces. Each seed counts
    once: its mean over the updates of a phase. Phases are thirds of training, and bins in which both norms have the
    same training loss, because a higher loss alone makes a wider band. A ratio above 1 is larger than the reference's.
    """
    # pandas and scipy are slow to import, and --help does not need them.
    from landscape.analysis.compare import compare
    from landscape.traces.reader import read_traces

    comparison = compare(read_traces(paths), measures, reference)
    echo(STYLES[style](comparison))
    if style in ("csv", "latex"):  # json and text hold them
        for note in comparison.notes:
            echo(f"Note: {note}", err=True)
    if figure:
        from landscape.plotting.figure import save_figure
        from landscape.plotting.forest import plot_forest

        save_figure(plot_forest(comparison), figure)
        report(f"Figure: {figure}", err=style != "text")


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of a line, as ``HEADINGS``."""
    own = [f"{value:.3g}" for value in row["seed_ratios"].values()]
    shown = own if len(own) <= SHOWN_SEEDS else [*own[: SHOWN_SEEDS - 1], "…"]
    return [
        row["phase"],
        row["band"],
        _number(row["ratio"]),
        f"[{row['low']:.3g}, {row['high']:.3g}]" if math.isfinite(row["low"]) else row["method"],
        f"{row['same_direction']} of {len(own)}",
        _number(row["p_holm"], ".2g"),
        _number(row["ratio_of_medians"]),
        " ".join(shown) or "-",
    ]


def _number(value: float, form: str = ".3g") -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _blocks(comparison: "Comparison") -> list[tuple[str, list[list[str]]]]:
    """Return title and lines of each table."""
    blocks = []
    for key, rows in comparison.table.groupby(["setting", "measure"], sort=False):
        setting, measure = map(str, key)  # pyright: ignore[reportArgumentType]
        rows = rows.assign(place=rows["phase"].map(list(dict.fromkeys(rows["phase"])).index)).sort_values(
            "place", kind="stable"
        )
        references = " and ".join(rows["reference"].unique())
        title = f"{measure}: {MEASURES[measure].title}, relative to {references}{f' ({setting})' * bool(setting)}"
        blocks.append((title, [_cells(row) for row in rows.to_dict("records")]))
    return blocks


def _text(comparison: "Comparison") -> str:
    parts = []
    for sentence in comparison.sentences:
        head, *lines = sentence.splitlines()
        parts.append("\n".join([textwrap.fill(head, WIDTH), *(_hanging(line) for line in lines)]))
    for title, lines in _blocks(comparison):
        parts.append(f"{title}\n{aligned(HEADINGS, lines)}")
    parts += [_hanging(f"Note: {note}") for note in comparison.notes]
    return "\n\n".join(parts)


def _hanging(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _markdown(comparison: "Comparison") -> str:
    parts = [sentence.replace(":\n", ":\n\n", 1) for sentence in comparison.sentences]
    for title, lines in _blocks(comparison):
        parts.append(f"**{title}**\n\n{markdown_table(HEADINGS, lines)}")
    return "\n\n".join([*parts, *(f"Note: {note}" for note in comparison.notes)])


def _csv(comparison: "Comparison") -> str:
    return csv_text([row | {"seed_ratios": json.dumps(row["seed_ratios"])} for row in _records(comparison)])


def _latex(comparison: "Comparison") -> str:
    parts = []
    for title, lines in _blocks(comparison):
        body = [" & ".join(map(_escaped, line)) + r" \\" for line in [list(HEADINGS), *lines]]
        head = [f"% {title}", r"\begin{tabular}{llrlrrrl}", r"\toprule", body[0], r"\midrule"]
        parts.append("\n".join([*head, *body[1:], r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("…", r"\dots{}")


def _json(comparison: "Comparison") -> str:
    seeds = [
        {name: finite_or_none(value) for name, value in row.items()} for row in comparison.seeds.to_dict("records")
    ]
    result = {"sentences": comparison.sentences, "notes": comparison.notes, "table": _records(comparison)}
    return json.dumps(result | {"seeds": seeds}, indent=1)


def _records(comparison: "Comparison") -> list[dict[str, Any]]:
    return _finite(comparison.table.to_dict("records"))


def _finite(rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    return [{name: finite_or_none(value) for name, value in row.items()} for row in rows]


STYLES: "dict[str, Callable[[Comparison], str]]" = {
    "text": _text,
    "md": _markdown,
    "csv": _csv,
    "latex": _latex,
    "json": _json,
}
