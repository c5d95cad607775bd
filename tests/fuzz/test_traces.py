"""Damaged trace folders: intact rows are read as recorded, and the rest is named."""

import io
import json
import os
import shutil
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st
from landscape_cli.main import main
from nonsense import anything, cases, soon, texts
from recordings import rows

from landscape.analysis.summary import summarize
from landscape.errors import LandscapeError
from landscape.plotting.landscape import plot_landscape
from landscape.traces.reader import list_runs, read_traces
from landscape.traces.schema import UPDATES
from landscape.traces.writer import TraceWriter

NORMS = ("none", "batch", "ghost")
COLUMNS = [column.name for column in UPDATES]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return a folder of three runs, each with three parts."""
    folder = tmp_path_factory.mktemp("recorded")
    for seed, norm in enumerate(NORMS):
        with TraceWriter(folder / norm, {"norm": norm, "groups": 8, "seed": seed}, flush_rows=4) as trace:
            for row in rows(steps=12, seed=seed):
                trace.append(row)
    return folder


def truncated(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flipped(path, share):
    content = bytearray(path.read_bytes())
    at, bit = divmod(int(share * 8 * len(content)), 8)
    content[at : at + 1] = bytes(each ^ 1 << bit for each in content[at : at + 1])
    path.write_bytes(content)


def overwritten(path, share):
    content = bytearray(path.read_bytes())
    at = int(share * len(content))
    content[at : at + 40] = bytes(range(40))
    path.write_bytes(content)


def emptied(path, share):
    path.write_bytes(b"")


def folder_instead(path, share):
    path.unlink()
    path.mkdir()


def circle(path, share):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path, share):
    path.unlink()
    os.mkfifo(path)


def content_of(path):
    return path.read_bytes() if path.is_file() else b""  # Reading a pipe would block.


def foreign(path, share):
    pq.write_table(pa.table({"step": [1, 2], "loss": ["a", "b"]}), path)


def of_another_run(path, share):
    norm = NORMS[NORMS.index(path.parent.name) - 1]
    path.write_bytes(content_of(path.parents[1] / norm / path.name))


def of_another_name(path, share):
    path.write_bytes(content_of(path.with_name(PARTS[int(share * len(PARTS))])))


def of_another_place(path, share):
    shutil.copy(path, path.with_name(f"updates-{1 + 2 * int(share * 10):09d}.parquet"))


def of_the_future(path, share):
    if path.suffix == ".json":
        path.write_text(json.dumps({"version": 10**6}))
    else:
        pq.write_table(pa.table({"step": [1]}).replace_schema_metadata({"landscape_version": "1000000"}), path)


def unreadable(path, share):
    path.chmod(0)  # Root can still read it.


def gone(path, share):
    path.unlink()


PARTS = [f"updates-{first:09d}.parquet" for first in (0, 4, 8)]
DAMAGES = [truncated, flipped, overwritten, emptied, folder_instead, circle, pipe, of_the_future, unreadable, gone]
damages = st.tuples(
    st.sampled_from(NORMS),
    st.sampled_from([*PARTS, "run.json"]),
    st.sampled_from([flipped] * 6 + [truncated] * 3 + DAMAGES),
) | st.tuples(
    st.sampled_from(NORMS),
    st.sampled_from(PARTS),
    st.sampled_from([foreign, of_another_run, of_another_name, of_another_place]),
)
shares = st.floats(0, 1, exclude_max=True)


def read(folder):
    """Return the frame, without the warning, and its entries of what is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        frame = read_traces(folder)
    return frame, " ".join(frame.attrs["left_out"])


def values(frame):
    """Return rows by run and step as text, because NaN differs from itself."""
    lists = frame[["run", *COLUMNS]].astype(object).map(lambda value: list(value) if np.ndim(value) else value)
    return {(row[0], row[1]): repr(row) for row in lists.itertuples(index=False, name=None)}


@cases(0.3)
@given(done=st.lists(st.tuples(damages, shares), min_size=1, max_size=3))
def test_intact_rows_are_read_and_damage_is_named(recorded, done):
    folder = recorded.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recorded, folder)
    touched = set()
    for (norm, name, damage), share in done:
        if (folder / norm / name).is_file():
            damage(folder / norm / name, share)
            touched.add((norm, name))
    whole, (frame, left_out) = values(read(recorded)[0]), (None, None)
    try:
        with soon("damaged traces"):
            frame, left_out = read(folder)
    except LandscapeError:
        assert {norm for norm, _ in touched} == set(NORMS)
    else:
        found = values(frame)
        assert len(found) == len(frame)
        assert found.items() <= whole.items()
        for norm, step in whole.keys() - found.keys():
            assert {(norm, PARTS[step // 4]), (norm, "run.json")} & touched
            assert str(folder / norm) in left_out


NAMES = [
    "norm",
    "groups",
    "channel_groups",
    "ghost_by",
    "seed",
    "model",
    "dataset",
    "batch_size",
    "base_lr",
    "direction",
]
NAMES += [
    "samples",
    "epochs",
    "schedule",
    "mode",
    "id",
    "version",
    "rows",
    "run",
    "started",
    "ended",
    "resumed",
    "band",
]
NAMES += ["step", "loss", "beta", "loss_min", "recipe"]
fact_values = anything | st.sampled_from(["ghost", "seq", "\ud800", 16, 0.4, "{" * 5000])
any_facts = st.dictionaries(st.sampled_from(NAMES) | texts, fact_values, max_size=4)


@cases(0.1)
@given(facts=st.tuples(any_facts, any_facts), layout=st.sampled_from(["overlay", "multiples"]))
@example(facts=({"norm": "$$", "model": "\ud800"}, {"norm": "\x1b[2J", "seed": 10**400}), layout="overlay")
@example(facts=({"norm": "$$", "groups": 2**63}, {"norm": "x" * 6000, "model": "x" * 6000}), layout="multiples")
@example(facts=({"norm": "ghost", "groups": "auto"}, {"norm": "ghost", "groups": 4}), layout="overlay")
@example(facts=({"samples": "many", "epochs": "1", "model": "m", "dataset": "d"},) * 2, layout="overlay")
def test_list_and_plot_any_metadata(recorded, tmp_path, facts, layout):
    for norm, own in zip(NORMS, facts, strict=False):
        shutil.copytree(recorded / norm, tmp_path / norm, dirs_exist_ok=True)
        (tmp_path / norm / "run.json").write_text(json.dumps({"norm": norm} | own, default=str))
    with warnings.catch_warnings(), soon("facts"):
        warnings.filterwarnings("ignore", "Left out|Glyph")  # Some characters are in no font.
        list_runs(tmp_path)
        if any(known.get("version", 3) not in (0, 1, 2, 3) or "id" in known for known in facts):
            return
        frame = read_traces(tmp_path)
        summarize(frame, by="band").to_string()
        plot_landscape(frame, layout=layout).savefig(io.BytesIO())


CONTENTS = {
    "not UTF-8": b'{"norm": "\xff"}',
    "a list": b"[1, 2]",
    "a number": b"1",
    "nothing": b"",
    "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "deep lists": b"[" * 100_000,
    "pairs": b'[["norm", "batch"], ["norm", "none"]]',
    "twice": b'{"norm": "batch", "norm": "none"}',
    "a long number": b'{"seed": ' + b"9" * 5000 + b"}",
    "no number": b'{"seed": NaN, "groups": Infinity, "version": 1e400}',
    "version as text": b'{"version": "new"}',
    "version as a list": b'{"version": [3]}',
    "an identity that is none": b'{"id": {"a": 1}}',
}


@pytest.mark.parametrize("name", CONTENTS)
def test_invalid_metadata_keeps_rows(recorded, tmp_path, name):
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    (tmp_path / "batch" / "run.json").write_bytes(CONTENTS[name])
    frame, _ = read(tmp_path)
    assert set(values(frame)) >= {(norm, step) for norm in ("none", "ghost") for step in range(12)}
    assert values(frame).items() <= values(read(recorded)[0]).items()
    results = [
        CliRunner().invoke(main, [*words, str(tmp_path)])
        for words in (["plot", "--out", str(tmp_path / "x.png")], ["list"])
    ]
    assert [result.exit_code for result in results] == [0, 0], results
