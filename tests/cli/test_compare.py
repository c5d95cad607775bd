import csv
import io
import json

import numpy as np
import pytest
from click.testing import CliRunner
from landscape_cli.compare import command as compare_command
from landscape_cli.main import main
from recordings import rows

from landscape import compare, read_traces
from landscape.analysis.compare import DEFAULT
from landscape.traces.writer import TraceWriter


@pytest.fixture
def traces(tmp_path):
    for norm, width in (("batch", 0.5), ("none", 1.5)):
        for seed in range(3):
            with TraceWriter(tmp_path / f"{norm}-{seed}", {"norm": norm, "seed": seed, "epochs": 4}) as trace:
                for row in rows(seed=seed, width=width):
                    trace.append(row)
    return tmp_path


def compared(*arguments):
    result = CliRunner().invoke(main, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


def test_text(traces):
    result = compared(traces)
    table = compare(read_traces(traces)).table
    assert max(map(len, result.stdout.splitlines())) <= 120
    row = table.iloc[2]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("last third") and "No norm" in line][:1]
    assert f" {row['ratio']:.3g} " in line
    assert f"[{row['low']:.3g}, {row['high']:.3g}]" in line
    assert "3 of 3" in line


def test_json(traces):
    answer = json.loads(compared(traces, "--format", "json", "--measure", "range").stdout)
    comparison = compare(read_traces(traces), measure="range")
    assert answer["sentences"] == list(comparison.sentences)
    assert answer["notes"] == list(comparison.notes)
    assert [row["ratio"] for row in answer["table"]] == list(comparison.table["ratio"])
    assert [row["value"] for row in answer["seeds"]] == list(comparison.seeds["value"])
    assert answer["table"][0]["loss_from"] is None


def test_csv(traces):
    read = list(csv.DictReader(io.StringIO(compared(traces, "--format", "csv").stdout)))
    table = compare(read_traces(traces)).table
    np.testing.assert_array_equal([float(row["ratio"]) for row in read], table["ratio"])
    assert json.loads(read[0]["seed_ratios"]) == table["seed_ratios"][0]


def test_markdown(traces):
    lines = [line for line in compared(traces, "--format", "md").stdout.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {9}
    assert len(lines) == 2 * (2 + 6)


def test_latex(traces):
    text = compared(traces, "--format", "latex").stdout
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in body} == {7}
    assert r"95 \% interval" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2


def test_figure(traces, tmp_path):
    compared(traces, "--figure", tmp_path / "forest.png", "--format", "csv")
    assert (tmp_path / "forest.png").read_bytes()[:4] == b"\x89PNG"


def test_reference(traces):
    answer = json.loads(compared(traces, "--format", "json", "--reference", "none").stdout)
    assert {row["reference"] for row in answer["table"]} == {"No normalization"}


def test_nothing_to_compare(traces):
    result = CliRunner().invoke(main, ["compare", str(traces / "batch-0")])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "BatchNorm" in result.stderr


def test_default_measures():
    """The command's default is written twice, so that its help needs no pandas."""
    (option,) = (param for param in compare_command.params if param.name == "measures")
    assert option.default == DEFAULT
