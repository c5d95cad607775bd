import os
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from command_line import check_usage_error
from landscape_cli.main import COMMANDS, main
from landscape_cli.params import RENAMED, Share

from landscape.names import MEASURES, NORMS
from landscape.training.presets import RECIPES

COLUMNS = 80


def help_of(*names):
    return CliRunner().invoke(main, [*names, "--help"], terminal_width=COLUMNS).output


def options_of(name):
    command = main.get_command(click.Context(main), name)
    return [option for option in command.params if isinstance(option, click.Option)]


def test_summaries_fit_into_80_columns():
    text = help_of()
    assert "..." not in text.partition("Commands:")[2]
    assert max(map(len, text.splitlines())) <= COLUMNS


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_under_a_heading(name):
    text, heading = help_of(name), {}
    for line in text.splitlines():
        if re.match(r"\S", line):
            title = line
        elif found := re.match(r"  (?:-[a-z], )?(--[a-z-]+)", line):
            heading[found[1]] = title
    assert heading.pop("--help") == "Help:"
    assert [heading.pop(name) for name in ("--quiet", "--verbose", "--traceback")] == ["Messages:"] * 3
    assert heading == {option.opts[-1]: f"{option.heading}:" for option in options_of(name)}


def test_old_names_are_accepted_and_hidden():
    names = {flag.lstrip("-") for name in COMMANDS for option in options_of(name) for flag in option.opts}
    assert set(RENAMED.values()) <= names
    assert not names & set(RENAMED)


@pytest.mark.parametrize(("text", "share"), [("7%", 0.07), ("0.1", 0.1), (" 20%", 0.2), ("300%", 3.0), ("1e-3%", 1e-5)])
def test_share(text, share):
    assert Share()(text) == share
    assert Share()(Share.to_text(share)) == share  # as passed to the processes of torchrun


@pytest.mark.parametrize("text", ["20", "1", "3.5", "0", "-1%", "nan", "inf%", "1e400%", "1e-400", "", "%", "x"])
def test_share_that_is_ambiguous_or_out_of_range(text):
    with pytest.raises(click.BadParameter, match=r"share|%"):
        Share()(text)


def completed(instruction, words, current):
    """Return what a shell is told to complete, or, for ``source``, its script."""
    environment = {"COMP_WORDS": " ".join(("landscape", *words)), "COMP_CWORD": current}
    environment["_LANDSCAPE_COMPLETE"] = instruction
    answer = subprocess.run(
        [sys.executable, "-c", "from landscape_cli.main import main; main(prog_name='landscape')"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.splitlines()


def completions(*words):
    return [tuple(line.split(",", 1)) for line in completed("bash_complete", words, str(len(words)))]


def test_completion_of_other_shells():
    """Zsh reads kind, value and help from three lines, fish from one with a tab; fish passes the word itself."""
    words = ("probe", "--ov")
    lines = completed("zsh_complete", words, "2")
    assert (lines[::3], lines[1::3]) == (["plain"] * 2, ["--overhead", "--overwrite"])
    fish = completed("fish_complete", words, "--ov")
    assert [line.partition("\t")[0] for line in fish] == ["plain,--overhead", "plain,--overwrite"]
    assert any(line.startswith("compdef ") for line in map(str.strip, completed("zsh_source", (), "")))
    assert any(line.startswith("complete ") for line in completed("fish_source", (), ""))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pl",), {"plot"}),
        (("probe", "--norm", "gh"), {name for name in NORMS if name.startswith("gh")}),
        (("probe", "--recipe", ""), {*RECIPES}),
        (("plot", "--measure", ""), {*MEASURES}),
        (("plot", "--scale", "l"), {"log", "linear"}),
        (("probe", "--ov"), {"--overhead", "--overwrite"}),
    ],
)
def test_completion_of_names(words, expected):
    assert {value for _, value in completions(*words)} == expected


@pytest.mark.parametrize(
    "words",
    [
        ("plot", "w/"),
        ("list", "w/"),
        ("probe", "--out", "w/"),
        ("figure", "4", "--traces", "w/"),
        ("plot", "--out", "w/"),
    ],
)
def test_completion_of_paths(words):
    assert completions(*words) == [("file", "w/")]


@pytest.mark.parametrize("name", ["typo", "file.txt", "x" * 300])
def test_mistyped_data_dir_is_not_created(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    for command in ("probe --recipe mnist", "tune --recipe classify-mnist", "table 1 --plan", "figure ranking"):
        result = CliRunner().invoke(main, [*command.split(), "--data-dir", name])
        check_usage_error(result, name)
        assert len(result.stderr.splitlines()[-1]) < 120 + len(name)
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]
