"""Frames that went through other tools, and come back to be summarized and drawn."""

import io
import os
import pickle
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from recordings import frame, frames, rows

from landscape.analysis.columns import LISTS, NUMBERS, lists, normalized, numbers
from landscape.analysis.measures import measured
from landscape.analysis.summary import envelope, summarize
from landscape.errors import LandscapeError
from landscape.plotting.figure import save_figure
from landscape.plotting.landscape import plot_landscape
from landscape.traces.parquet import schema
from landscape.traces.reader import read_traces
from landscape.traces.writer import TraceWriter

MEASURE = "gap"


def check_same(changed, run, **tolerance):
    """Check that a frame gives the same numbers, and can be drawn."""
    for measure in ("loss", MEASURE):
        got, expected = (summarize(of, by="run", measure=measure) for of in (changed, run))
        pd.testing.assert_frame_equal(got, expected, check_dtype=False, check_categorical=False, **tolerance)
    got, expected = (envelope(of, by="run", measure=MEASURE) for of in (changed, run))
    pd.testing.assert_frame_equal(got, expected, check_dtype=False, check_categorical=False, **tolerance)
    figure, twin = (plot_landscape(of, measure=["loss", MEASURE]) for of in (changed, run))
    assert figure.get_supxlabel() == twin.get_supxlabel()
    figure.draw_without_rendering()


def by_csv(run):
    return pd.read_csv(io.StringIO(run.to_csv(index=False)))


def by_json(run):
    return pd.read_json(io.StringIO(run.to_json(orient="records")), orient="records", precise_float=True)


def by_sql_text(run):
    return run.assign(**{name: [str(values.tolist()) for values in run[name]] for name in LISTS[:3]})


def map_lists(convert):
    return lambda run: run.assign(**{name: [convert(values) for values in run[name]] for name in LISTS[:3]})


CHANGES = {
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
    "csv": by_csv,
    "json": by_json,
    "text": by_sql_text,
    "python lists": map_lists(np.ndarray.tolist),
    "tuples": map_lists(tuple),
    "tensors": map_lists(torch.from_numpy),
    "masked arrays": map_lists(np.ma.masked_invalid),
    "list of NumPy scalars as text": map_lists(lambda values: str(list(values))),
    "object": lambda run: run.astype(object),
    "nullable": lambda run: run.convert_dtypes(),
    "arrow": lambda run: run.convert_dtypes(dtype_backend="pyarrow"),
    "text everywhere": lambda run: run.astype({name: str for name in NUMBERS if name in run}),
    "decimals": lambda run: run.assign(loss=[Decimal(repr(value)) for value in run["loss"]]),
    "shuffled": lambda run: run.sample(frac=1, random_state=0),
    "repeated index": lambda run: run.set_index(np.zeros(len(run), int)),
    "join": lambda run: run.merge(pd.DataFrame({"run": run["run"].unique(), "machine": 7}), on="run", how="left"),
    "concat": lambda run: pd.concat([run.iloc[:9], by_csv(run.iloc[9:50]), by_sql_text(run.iloc[50:])]),
    "groupby": lambda run: pd.concat([rows for _, rows in run.groupby("run")]),
    "more columns": lambda run: run.assign(**{"a b": "x", "weird": [{}] * len(run)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_frame_after(change):
    runs = frames("none", "batch", seeds=(0,))
    changed = CHANGES[change](runs)
    # NumPy writes 8 digits of the values of an array.
    check_same(changed, runs, rtol=1e-5 if change in ("csv", "concat") else 1e-12)


def test_frame_is_not_changed():
    run = by_csv(frame(steps=4))
    copy = run.copy(deep=True)
    measured(run, MEASURE)
    pd.testing.assert_frame_equal(run, copy)
    usual = frame(steps=4)
    assert normalized(usual) is usual


def test_columns_of_the_schema():
    kinds = {field.name: str(field.type) for field in schema("updates")}
    assert set(LISTS) == {name for name, kind in kinds.items() if kind.startswith("list")}
    assert set(kinds) - set(LISTS) <= set(NUMBERS)


@pytest.mark.parametrize("read", ["parquet", "feather"])
@pytest.mark.parametrize("imported", [True, False])
def test_pandas_reads_what_it_wrote(tmp_path, read, imported):
    for seed in range(2):
        with TraceWriter(tmp_path / "traces" / str(seed), {"norm": "ghost", "groups": 2, "seed": seed}) as trace:
            for row in rows(seed=seed):
                trace.append(row)
    run, file = read_traces(tmp_path / "traces"), tmp_path / "frame"
    getattr(run, f"to_{read}")(file)
    if imported:
        check_same(getattr(pd, f"read_{read}")(file), run)
    else:
        code = f"import sys, pandas as pd; f = pd.read_{read}(sys.argv[1]); assert len(f.losses[0]) == 3, f.losses"
        bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([sys.executable, "-I", "-c", code, str(file)], check=True, env=bare)


@pytest.mark.parametrize("tool", ["polars", "duckdb"])
def test_other_tools_read_a_run_folder(tmp_path, tool):
    with TraceWriter(tmp_path / "run", {"norm": "batch"}, flush_rows=10) as trace:
        for row in rows():
            trace.append(row)
    parts = str(tmp_path / "run" / "*.parquet")
    if tool == "polars":
        found = pytest.importorskip("polars").read_parquet(parts).to_pandas()
    else:
        found = pytest.importorskip("duckdb").connect().execute(f"select * from read_parquet('{parts}')").df()
    assert len(list((tmp_path / "run").glob("*.parquet"))) > 1
    run = read_traces(tmp_path).assign(run="").drop(columns="norm")
    check_same(found.assign(run="").sort_values("step"), run)


def test_lists_with_missing_values():
    column = lists(
        pd.Series(["[1, null, nan]", None, np.nan, pd.NA, "", "NULL", "[]", "tensor([1., inf])"], name="losses")
    )
    assert [None if value is None else value.tolist() for value in column[1:]] == [None] * 5 + [[], [1.0, np.inf]]
    np.testing.assert_array_equal(column[0], [1, np.nan, np.nan])


def test_list_of_numpy_in_several_lines():
    values = np.linspace(0, 1, 40)
    (found,) = lists(pd.Series([str(values)]))
    np.testing.assert_allclose(found, values, atol=1e-8)


def test_numbers():
    assert numbers(pd.Series([1, 2], dtype="Int64")).dtype == "int64"
    assert numbers(pd.Series([True, False], dtype=object)).tolist() == [1.0, 0.0]
    np.testing.assert_array_equal(numbers(pd.Series(["1e3", None, "nan", "inf"])), [1000, np.nan, np.nan, np.inf])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("losses", "[0.1 0.2 ... 0.9]"),
        ("losses", "0.1, 0.2"),
        ("losses", "no list"),
        ("losses", [[0.1, 0.2]]),
        ("losses", 3.5),
        ("step_sizes", ["a"]),
        ("loss", "high"),
        ("loss", [1.0]),
        ("step", "first"),
        ("step", pd.Timestamp("2020-01-01")),
    ],
)
@pytest.mark.parametrize("use", [summarize, plot_landscape])
def test_value_is_refused_by_column(name, value, use):
    run = frame(steps=3).astype({name: object})
    run[name] = pd.Series([run[name][0], value, run[name][2]], dtype=object)
    with pytest.raises(LandscapeError, match=f"{name}, row 1"):
        use(run)


@pytest.mark.parametrize("name", ["step", "loss", "step_sizes"])
def test_column_is_missing(name):
    with pytest.raises(LandscapeError, match=f"columns={name}:"):
        plot_landscape(frame(steps=3).drop(columns=name))


def test_column_is_missing_for_the_measure():
    with pytest.raises(LandscapeError, match="columns=losses:"):
        measured(frame(steps=3).drop(columns="losses"), MEASURE)
    with pytest.raises(LandscapeError, match="columns=loss:"):
        measured(frame(steps=3).drop(columns="loss"), MEASURE)


def test_column_in_the_index():
    with pytest.raises(LandscapeError, match=r"columns=step:.*reset_index"):
        summarize(frame(steps=3).set_index("step"))


def test_column_twice():
    run = frame(steps=3)
    with pytest.raises(LandscapeError, match="columns=loss:"):
        summarize(pd.concat([run, run[["loss"]]], axis=1))


def test_no_pandas_frame():
    with pytest.raises(LandscapeError, match="to_pandas"):
        plot_landscape({"loss": [1.0]})


def test_all_step_sizes_missing(tmp_path):
    run = frame(steps=3).assign(step_sizes=None, losses=None)
    save_figure(plot_landscape(run), tmp_path / "figure.png")
