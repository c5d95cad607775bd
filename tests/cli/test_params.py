import re

import click
import pytest
from click.testing import CliRunner
from landscape_cli.main import COMMANDS, main
from landscape_cli.params import RENAMED

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
        elif found := re.match(r"  (?:-h, )?(--[a-z-]+)", line):
            heading[found[1]] = title
    assert heading.pop("--help") == "Help:"
    assert heading == {option.opts[0]: f"{option.heading}:" for option in options_of(name)}


def test_old_names_are_accepted_and_hidden():
    names = {flag.lstrip("-") for name in COMMANDS for option in options_of(name) for flag in option.opts}
    assert set(RENAMED.values()) <= names
    assert not names & set(RENAMED)
