from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from landscape_cli.figure import FIGURES, FigureRequest, _ranking_recipes
from landscape_cli.main import main
from real_data import REAL_DATA

from landscape.paper.figures4_5 import COMPARISONS, comparison
from landscape.training.presets import RECIPES
from landscape.training.train import train


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(main, ["figure", *arguments])


def test_figure1_files_are_reproducible(tmp_path):
    pictures = []
    for out in ("figures", "again"):
        result = run("1", "--out", out)
        assert result.exit_code == 0, result.output
        assert result.output.splitlines() == [f"Figure: {out}/figure1.png", f"Figure: {out}/figure1.svg"]
        pictures.append([(tmp_path / out / f"figure1.{suffix}").read_bytes() for suffix in ("png", "svg")])
    assert pictures[0] == pictures[1]
    assert pictures[0][0].startswith(b"\x89PNG")


def test_ranking_with_recipe(tmp_path):
    result = run("ranking", "--recipe", "digits", "--recipe", "digits", "--scale", "small", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stderr == "Training simplenet on digits ...\n"
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["%", "at", "G", "=", "1", "2", "4", "8", "16", "32"]
    shares = pd.read_csv(tmp_path / "figures" / "ranking-small-digits.csv")
    assert list(shares)[4:] == ["1", "2", "4", "8", "16", "32"]
    assert [line.split()[-6] for line in lines[2:6]] == ["0"] * 4  # BatchNorm
    assert [line for line in lines[2:6] if " 11 " in line]  # updates of one epoch
    assert lines[-2:] == [f"Figure: figures/ranking-small-digits.{suffix}" for suffix in ("png", "svg")]
    assert (
        "<!-- SimpleNet on digits, after 11 updates -->" in (tmp_path / "figures/ranking-small-digits.svg").read_text()
    )


@pytest.mark.skipif(not (REAL_DATA / "mnist").is_dir(), reason=f"no folder mnist in {REAL_DATA}")
def test_ranking_small_on_mnist():
    result = run("ranking", "--scale", "small", "--data-dir", str(REAL_DATA), "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stderr == "Training simplenet on mnist ...\n"
    last = [float(share) for share in result.stdout.splitlines()[5].split()[-8:]]
    assert last[0] == 0
    assert last == sorted(last)
    assert 15 < last[-1] < 25


def test_ranking_recipes_of_paper():
    request = FigureRequest(Path("figures"), "paper", None, (), None, None)
    first, second = (recipe.resolve() for recipe in _ranking_recipes(request))
    assert first == RECIPES["mnist"].resolve()
    assert (second.model, second.dataset, second.augment) == ("resnet20", "cifar10", ())
    assert [recipe.name for recipe in _ranking_recipes(replace(request, recipes=("digits",)))] == ["digits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("2", "'2' is not one of '1', 'ranking'"),
        ("1 --scale huge", "'huge' is not one of 'small', 'paper'"),
        ("1 --out file.txt", "--out file.txt: is a file"),
        ("1 --recipe digits", "Omit --recipe"),
        ("ranking --recipe mint", "'mint' is not one of 'mnist', 'digits'"),
        ("ranking --recipe digits --device abacus", "device='abacus'"),
        ("ranking --recipe digits --recipe mnist --data-dir file.txt", "file.txt"),
        ("", "Missing argument"),
    ],
)
def test_usage_error_is_one_line(tmp_path, arguments, message):
    (tmp_path / "file.txt").write_text("kept")
    result = run(*arguments.split())
    assert result.exit_code == 2, result.output
    assert message in result.output.splitlines()[-1]
    assert "Traceback" not in result.output
    assert "Training" not in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["file.txt"]


def test_help_lists_figures_and_recipes():
    words = run("--help").output.replace(",", " ").replace(".", " ").replace("-\n", "-").split()
    assert not {*FIGURES} - {*words}
    assert not {name for name in RECIPES if name not in "".join(run("--help").output.split())}


def test_figure4_trains_missing_runs(monkeypatch):
    runs = comparison(replace(RECIPES["digits"], epochs=1), (8,))
    monkeypatch.setitem(COMPARISONS, ("4", "small"), runs)
    first = run("4", "--scale", "small", "--device", "cpu")
    assert first.exit_code == 0, first.output
    assert "Training 3 of 3 runs into figures/traces/digits" in first.stderr
    again = run("4", "--scale", "small", "--out", "again", "--traces", "figures/traces/digits")
    assert again.exit_code == 0, again.output
    assert not again.stderr
    assert again.stdout == first.stdout[first.stdout.index("mean range     No") :].replace("figures/fig", "again/fig")
    assert again.stdout.splitlines()[-1] == "Figure: again/figure4-digits.svg"
    assert Path("again/figure4-digits.png").read_bytes() == Path("figures/figure4-digits.png").read_bytes()


def test_figure4_resumes_run(monkeypatch):
    runs = comparison(replace(RECIPES["digits"], epochs=1), (8,))
    monkeypatch.setitem(COMPARISONS, ("4", "small"), runs)

    def stop(probe):
        if probe.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(runs[1], "figures/traces/digits", device="cpu", on_update=stop)
    result = run("4", "--scale", "small", "--device", "cpu")
    assert result.exit_code == 0, result.output
    resumed = [sorted(Path("figures/traces/digits", recipe.run_name).glob("updates-*")) for recipe in runs]
    assert [[path.name for path in parts] for parts in resumed] == [
        ["updates-000000000.parquet"],
        ["updates-000000000.parquet", "updates-000000007.parquet"],
        ["updates-000000000.parquet"],
    ]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [("4 --recipe digits", "--recipe"), ("1 --traces traces", "--traces"), ("ranking --traces traces", "--traces")],
)
def test_option_of_other_figure_is_rejected(arguments, option):
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert result.output.startswith(f"Error: {option}: ")
    assert result.output.endswith(f"Omit {option}.\n") or "use --scale" in result.output
