"""The paper's claims: measure, statistic and verdict of each, from recorded runs and trials."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from landscape.analysis.compare import BINS, THIRDS, Comparison, compare
from landscape.analysis.labels import band_labels
from landscape.analysis.measures import has_inputs
from landscape.analysis.statistics import difference, ratio
from landscape.analysis.verdict import told_apart
from landscape.errors import LandscapeError
from landscape.names import NORMS, TITLES
from landscape.paper.figures4_5 import COMPARISONS, roughness
from landscape.text import markdown_table
from landscape.traces.reader import read_traces

AGREES, DIFFERS, UNTOLD = "agrees", "does not", "cannot be told"
"""Verdicts: an interval on the side of the claim, on the other side, or on both."""
SMOOTHNESS = (
    *("range", "predictiveness", "beta"),
    *("relative_range", "lost_share", "batch_sharpness", "critical_sharpness", "lipschitz"),
)
"""Measures of the claims on smoothness: those of Santurkar et al., then those that do not grow with the loss."""
BASELINE, REFERENCE = NORMS["none"].title, NORMS["batch"].title
GUESSING = 0.1
"""Accuracy of a random guess: the data sets of the figures have 10 classes."""


class Claim(NamedTuple):
    """Claim by one measure.

    Attributes:
        sentence: What is claimed.
        measure: What it is judged by.
        result: Statistics, as text.
        verdict: One of `AGREES`, `DIFFERS` and `UNTOLD`.
    """

    sentence: str
    measure: str
    result: str
    verdict: str


@dataclass(frozen=True)
class Section:
    """Claims on the same runs.

    Attributes:
        title: Heading.
        runs: Runs that the numbers are of.
        claims: Claims.
        table: Further numbers, or None.
    """

    title: str
    runs: str
    claims: tuple[Claim, ...]
    table: pd.DataFrame | None = None


def recorded_claims(folder: Path) -> list[Section]:
    """Return the claims on a folder's runs and trials.

    Args:
        folder: Folder of `landscape figure` and `landscape table`, with ``traces/*`` and ``*/trials.parquet``.

    Raises:
        LandscapeError: The folder holds neither.
    """
    sections = [*_figures(folder), *_tables(folder)]
    if not sections:
        raise LandscapeError(
            f"{folder}: must have traces of figure 4 or 5, or trials of a table. Run `landscape figure 4` first."
        )
    return sections


def _figures(folder: Path) -> Iterator[Section]:
    for (number, scale), recipes in COMPARISONS.items():
        locations = [folder / "traces" / recipe.name / recipe.run_name for recipe in recipes]
        held = [location for location in locations if location.is_dir()]
        if held:
            frame, epochs = read_traces(held), read_traces(held, table="epochs")
            title = f"Figure {number}{' at small scale' * (scale == 'small')}"
            base = recipes[0]
            runs = (
                f"{len(held)} of {len(recipes)} runs of recipe {base.name}: {TITLES[base.model]} on "
                f"{TITLES.get(base.dataset, base.dataset)}, {base.epochs} epochs, batches of {base.batch_size}."
            )
            yield Section(title, runs, tuple(figure_claims(frame, epochs)), roughness(frame, epochs))


def figure_claims(frame: pd.DataFrame, epochs: pd.DataFrame) -> Iterator[Claim]:
    """Yield the claims of figures 4 and 5.

    Args:
        frame: Probed updates of runs without normalization, with BatchNorm and with GhostNorm.
        epochs: Epochs of the same runs.
    """
    measures = [name for name in SMOOTHNESS if has_inputs(frame, name).any()]
    bands = band_labels(frame)
    labels = [str(label) for label in bands.cat.categories]
    ghosts = [label for label in labels if label.startswith(NORMS["ghost"].title)]
    if REFERENCE in labels and len(labels) > 1:
        comparison = compare(frame, measures)
        for band in [label for label in labels if label != REFERENCE]:
            for phases, when in ((THIRDS, "over training"), (BINS, "at equal loss")):
                for measure in measures:
                    yield _rougher(comparison, band, measure, phases, when)
        if len(ghosts) > 1 and BASELINE in labels:
            for measure in measures:
                yield _closer(comparison, ghosts[0], ghosts[-1], measure)
    of_runs = dict(zip(frame["run"].astype(str), bands.astype(str), strict=True))
    last = epochs[epochs["epoch"] == epochs.groupby("run", observed=True)["epoch"].transform("max")]
    of_last = [of_runs[str(run)] for run in last["run"]]
    for band in labels:
        rate = float(np.max(frame["lr"][(bands == band).to_numpy()]))
        yield _trains(band, rate, pd.DataFrame(last[[label == band for label in of_last]]))


def _rougher(comparison: Comparison, band: str, measure: str, phases: Sequence[str], when: str) -> Claim:
    rows = comparison.table
    rows = pd.DataFrame(rows[(rows["band"] == band) & (rows["measure"] == measure)])
    part = pd.DataFrame(rows[rows["phase"].isin(phases) & rows["ratio"].notna()])
    sentence = f"{band} is less smooth than {REFERENCE}, {when}"
    if part.empty:
        return Claim(sentence, measure, "never at the same loss" if phases == BINS else "no ratio", UNTOLD)
    rougher, smoother = told_apart(measure, part, int(rows["seeds"].to_numpy().max()))
    cells = [_interval(row["ratio"], row["low"], row["high"]) for row in part.to_dict("records")]
    return Claim(sentence, measure, "; ".join(cells), _verdict(rougher, smoother))


def _verdict(agreeing: float, differing: float) -> str:
    if bool(agreeing) == bool(differing):
        return UNTOLD
    return AGREES if agreeing else DIFFERS


def _interval(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.3g}" + (f" [{low:.3g}, {high:.3g}]" if np.isfinite(low) else "")


def _closer(comparison: Comparison, few: str, many: str, measure: str) -> Claim:
    """Return the claim that more groups approach the baseline.

    The distance of a norm is ``exp(mean_t |log(v_t / b_t)|)``, with its mean ``v_t`` and that of the baseline ``b_t``
    in the thirds t of training, seed by seed.
    """
    seeds = comparison.seeds
    seeds = pd.DataFrame(seeds[(seeds["measure"] == measure) & seeds["phase"].isin(THIRDS)])
    means = seeds.pivot_table("value", ["seed", "phase"], "band")
    logs = pd.DataFrame(np.log(means.where(means > 0)))
    distances = pd.DataFrame({band: np.abs(logs[band] - logs[BASELINE]) for band in (few, many)})
    distances = pd.DataFrame(np.exp(pd.DataFrame(distances.groupby("seed").mean()).dropna()))
    sentence = f"{many} is closer to {BASELINE} than {few}"
    if distances.empty:
        return Claim(sentence, measure, "no ratio", UNTOLD)
    ours, theirs = (np.asarray(distances[band], float) for band in (few, many))
    result = ratio(ours, theirs, paired=True)
    factors = " and ".join(f"{np.exp(np.log(values).mean()):.3g}" for values in (theirs, ours))
    verdict = _verdict(result.low > 1, result.high < 1)
    return Claim(
        sentence, measure, f"factors {factors}; quotient {_interval(result.ratio, result.low, result.high)}", verdict
    )


def _trains(band: str, rate: float, last: pd.DataFrame) -> Claim:
    accuracy = last["test_accuracy"].to_numpy(float)
    trained = np.isfinite(last["train_loss"].to_numpy(float)) & (accuracy > 2 * GUESSING)
    shown = f"{', '.join(f'{value:.1%}' for value in accuracy)}: {trained.sum()} of {len(trained)} seeds"
    sentence = f"{band} trains at learning rates up to {rate:.2g}"
    verdict = AGREES if trained.all() else DIFFERS if not trained.any() else UNTOLD
    return Claim(sentence, "test accuracy above twice that of a guess", shown, verdict)


_TABLE = (("seq", "ghost"), ("ghost", "batch"), ("batch", "group"))
ORDERS: dict[str, tuple[tuple[str, str], ...]] = {
    **{f"table{number}-{scale}": _TABLE for number in (1, 2) for scale in ("paper", "small")},
    "negative-digits": (
        *_TABLE,
        *(("seq", "seq-reversed"), ("ghost", "ghost-ws"), ("seq", "seq-ws"), ("ghost", "ghost-mean")),
        *(("ghost", "group"), ("seq", "batch-group")),
    ),
}
"""Pairs of norms of which the paper's first attains more, by the name of a table's folder (sections 3.2 and 3.3)."""


def _tables(folder: Path) -> Iterator[Section]:
    for name, orders in ORDERS.items():
        path = folder / name / "trials.parquet"
        if path.is_file():
            trials = pd.read_parquet(path)
            number = f"Table {name[5]}{' at small scale' * name.endswith('small')}"
            title = number if name.startswith("table") else "Section 3.3, the negative results, on digits"
            tested = len(trials[trials["part"] == "test"])
            runs = f"{len(trials)} trainings; {tested} of them are of the chosen configurations, and are tested."
            found = [*order_claims(trials, orders)]
            other = folder / "grid-digits" / "trials.parquet"
            if name == "negative-digits" and other.is_file():
                found.append(grid_claim(trials, pd.read_parquet(other)))
            yield Section(title, runs, tuple(found))


def order_claims(trials: pd.DataFrame, orders: Sequence[tuple[str, str]]) -> Iterator[Claim]:
    """Yield the claims that one norm attains more than another.

    Test accuracies are compared seed by seed, with a paired t interval of the difference.

    Args:
        trials: Trials of a search, with the columns ``norm``, ``seed``, ``part`` and ``test_accuracy``.
        orders: Pairs of norms, the better one first.

    Examples:
        >>> accuracy = {"seq": (0.8, 0.9, 0.84), "ghost": (0.7, 0.79, 0.73)}
        >>> trials = pd.DataFrame([{"norm": norm, "seed": seed, "part": "test", "test_accuracy": value}
        ...                        for norm, values in accuracy.items() for seed, value in enumerate(values)])
        >>> claim = next(order_claims(trials, [("seq", "ghost")]))
        >>> claim.sentence, claim.verdict
        ('SeqNorm attains more than GhostNorm', 'agrees')
    """
    tested = trials[trials["part"] == "test"].set_index(["norm", "seed"])["test_accuracy"].sort_index()
    held = set(tested.index.get_level_values(0))
    for better, worse in orders:
        if {better, worse} <= held:
            values = [np.asarray(tested[norm], float) for norm in (better, worse)]
            text, low, high = _difference(*values)
            yield Claim(
                f"{NORMS[better].title} attains more than {NORMS[worse].title}",
                f"test accuracy, {len(values[0])} paired seeds",
                text,
                _verdict(low > 0, high < 0),
            )


def _difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[str, float, float]:
    """Return the difference in points, as text, and its interval."""
    result = difference(100 * ours, 100 * theirs, paired=True)
    means = f"{ours.mean():.2%} and {theirs.mean():.2%}"
    interval = f"{result.difference:+.2f} [{result.low:+.2f}, {result.high:+.2f}]"
    return f"{means}: {interval} points", result.low, result.high


def grid_claim(sequential: pd.DataFrame, grid: pd.DataFrame) -> Claim:
    """Return the claim that sequential tuning equals a grid.

    It agrees if the interval of the grid's advantage in test accuracy is below half a point, the tolerance within which
    the paper calls configurations equal.

    Args:
        sequential: Trials of the search that selects G_M first.
        grid: Trials of the search that tries all combinations, with the same seeds.
    """
    tested = [
        np.asarray(pd.DataFrame(each[(each["norm"] == "seq") & (each["part"] == "test")])["test_accuracy"], float)
        for each in (grid.sort_values("seed"), sequential.sort_values("seed"))
    ]
    text, low, high = _difference(*tested)
    tolerance = 0.5
    sentence = f"Tuning G_M first and then G_C attains at most {tolerance} points less than a grid of both"
    measure = f"test accuracy, {len(tested[0])} paired seeds"
    return Claim(sentence, measure, text, _verdict(high < tolerance, low > tolerance))


def markdown(sections: Sequence[Section], command: str) -> str:
    """Format sections as a page: a summary, then each result.

    Args:
        sections: Sections, such as those of `recorded_claims`.
        command: Command that makes the page.
    """
    parts = ["# The paper's claims, one by one", _INTRODUCTION.format(command=command)]
    parts += [f"**{section.title}**\n\n{_summary(section.claims)}" for section in sections]
    parts.append(_DETAILS)
    for section in sections:
        rows = [[claim.sentence, claim.measure, claim.result, claim.verdict] for claim in section.claims]
        parts += [f"### {section.title}", section.runs, markdown_table(["claim", "measure", "result", "verdict"], rows)]
        if section.table is not None:
            parts.append(_numbers(section.table))
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = f"""\
Made by `{{command}}` from traces and trials; no number in it is typed. Every claim is judged by each measure:
*{AGREES}* if it is told apart from its opposite at the level of 5 %, *{DIFFERS}* if the opposite is, and *{UNTOLD}*
else. Claims on smoothness are ratios to {REFERENCE} in three phases of training, with p values after Holm's correction:
they agree if a phase does and none shows the opposite."""
_DETAILS = f"""\
## The numbers

Ratios to {REFERENCE} are those of the thirds of training, or of the bins of equal training loss, from the first to the
last. In brackets are 95 % intervals over seeds."""


def _summary(claims: Sequence[Claim]) -> str:
    """Return a line per sentence, with measures by verdict."""
    by_sentence: dict[str, dict[str, list[str]]] = {}
    for claim in claims:
        by_sentence.setdefault(claim.sentence, {}).setdefault(claim.verdict, []).append(claim.measure)
    verdicts = (AGREES, DIFFERS, UNTOLD)
    rows = [[text, *(", ".join(of.get(verdict, ["-"])) for verdict in verdicts)] for text, of in by_sentence.items()]
    return markdown_table(["claim", *(f"{verdict} by" for verdict in verdicts)], rows)


def _numbers(table: pd.DataFrame) -> str:
    rows = [
        [str(name), *(f"{value:.3g}" if np.isfinite(value) else "-" for value in values)]
        for name, values in zip(table.index, table.to_numpy(float), strict=True)
    ]
    return markdown_table([str(table.columns.name or ""), *map(str, table.columns)], rows)
