"""Invalid command lines: combinations of all options of all commands with random values."""

import os
import shutil

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from landscape_cli.main import main
from landscape_cli.params import RENAMED
from nonsense import TEXTS, also, cases, soon, texts, tree
from processes import PATIENCE
from recordings import rows

from landscape.names import MEASURES, NORMS
from landscape.traces.writer import TraceWriter
from landscape.training.presets import RECIPES
from landscape.training.recipe import PRECISIONS

TINY = {
    "probe": "--recipe digits --norm batch --epochs 1 --every 100 --train-samples 256 --device cpu",
    "tune": "--norm batch --runs 1 --epochs 1 --device cpu --plan",
    "figure": "--data-dir a_folder",
    "table": "--data-dir a_folder --plan",
}
"""First options of each command, so that a valid case ends soon; later options may override them."""
RIGHT = {
    "recipe": [*RECIPES],
    "recipes": ["mnist", "cifar10"],
    "norms": [*NORMS],
    "ghost_by": ["layer", "accumulation"],  # ranks starts a process per group
    "precision": [*PRECISIONS],
    "device": ["cpu", "meta", "cuda", "cuda:99", "mps", "xpu"],
    "measures": [*MEASURES],
    "x": ["step", "epoch"],
    "scale": ["auto", "log", "symlog", "linear", "small"],
    "layout": ["auto", "overlay", "multiples"],
    "storage": ["sqlite://", "sqlite:////dev/full", "sqlite:///x/y/z", "sqlite:///.", "mysql://a/b", "postgresql://"],
    "name": ["1", "5", "ranking"],  # 4 would train on digits
    "number": ["1", "2"],
    "epochs": ["1", "0", "-1", "nan", "1.5"],  # many other values are valid
    "jobs": ["1", "0", "-1", "9" * 30],
}
"""Values by the name of an option, valid and invalid; other options have values by type."""
INTEGERS = ["1", "2", "4", "128", "0", "-1", "9" * 30, "-" + "9" * 30, "1.5", "1e3", "٣", str(2**63 - 1), str(2**63)]
FLOATS = ["0.1", "0", "-0.0", "nan", "inf", "-inf", "1e400", "1e-400", "1e308", "5e-324", "0,1", "10%", "nan%", "%"]
PATHS = [
    *("new", "a_file", "a_folder", "runs", "missing/x", "../beside", "", "-", ".", "..", "~nobody/x", "p" * 300),
    *("q/" * 3000, "/dev/null", "/dev/full", "/dev/null/x", "/proc/nope/x", "loop", "dangling", "pipe", "a_file/x"),
    *("x.png", "a_folder/x.svg", "new/x.pdf", "x.gif", "pipe/x.png", "\udcff.png", "$HOME\n.png", "s3://", "no://x"),
]
WRITTEN = ("out", "data_dir", "traces", "storage")
"""Options whose values are paths that are written to."""
ALIASES = {new.replace("-", "_"): [f"--{old}"] for old, new in RENAMED.items()}
DEFAULTS = ("traces", "landscape.png", "figures", "tuning", "home", "a_folder")


def values(parameter):
    kind = type(parameter.type).__name__
    by_type = {
        "IntParamType": INTEGERS,
        "FloatParamType": FLOATS,
        "Share": FLOATS,
        "Numbers": [*FLOATS, "0.1,0.2", "0.1,,1", "1,nan", "1e39", ",".join(["0.1"] * 500)],
        "Path": PATHS,
        "LocationType": ["runs"] * 20 + PATHS,
    }
    fitting = RIGHT.get(parameter.name) or list(getattr(parameter.type, "choices", [])) or by_type.get(kind, PATHS)
    return st.one_of([st.sampled_from(fitting)] * 5 + [texts])


@st.composite
def command_lines(draw):
    """Arguments of ``landscape``, and the paths that may be written."""
    name = draw(st.sampled_from(main.list_commands(click.Context(main))))
    words, written = TINY.get(name, "").split(), [*DEFAULTS]
    parameters = main.get_command(click.Context(main), name).params
    options = [each for each in parameters if isinstance(each, click.Option)]
    for option in draw(st.lists(st.sampled_from(options), max_size=5)) if options else []:
        flag = draw(st.sampled_from([*option.opts, *ALIASES.get(option.name, [])]))
        if option.is_flag:
            words.append(flag)
            continue
        value = draw(values(option))
        words += [f"{flag}={value}"] if draw(st.booleans()) else [flag, value]
        if option.name in WRITTEN:
            written.append(value.rpartition("///")[2])
    for argument in (each for each in parameters if isinstance(each, click.Argument)):
        many = draw(st.sampled_from([1, 1, 1, 1, 0, 2]))
        words[0:0] = [draw(values(argument)) for _ in range(many)]
    if draw(st.integers(0, 19)) == 0:
        words.insert(draw(st.integers(0, len(words))), draw(st.sampled_from([*TEXTS, "--nope", "--help", "-h"])))
    return [name, *words], written


@pytest.fixture
def refresh(tmp_path, monkeypatch):
    """Return a function that creates a folder of files and enters it; nothing outside may be changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "in" / "work" / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "in" / "work" / "home"))
    for scheme in ("HTTP", "HTTPS", "http", "https"):  # every download is refused at once
        monkeypatch.setenv(f"{scheme}_PROXY" if scheme.isupper() else f"{scheme}_proxy", "http://127.0.0.1:9")
    work, pattern = tmp_path / "in" / "work", tmp_path / "pattern"
    for norm in ("batch", "none"):
        with TraceWriter(pattern / "runs" / norm, {"norm": norm, "seed": 0}) as trace:
            for row in rows(steps=5):
                trace.append(row)
    (pattern / "a_folder").mkdir()
    (pattern / "a_file").touch()
    (pattern / "loop").symlink_to("loop")
    (pattern / "dangling").symlink_to("nowhere/x")

    def create():
        os.chdir(tmp_path)
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        shutil.copytree(pattern, work, symlinks=True)
        os.mkfifo(work / "pipe")
        os.chdir(work)
        return tmp_path

    return create


@cases(0.25)
@given(line=command_lines())
@also("line", (["plot", "runs", "--out", "\udcff.png"], ["\udcff.png"]), (["plot", "runs", "pipe"], [*DEFAULTS]))
@also("line", (["plot", "loop"], []), (["probe", "new\nline"], []), (["table"], []))
@also("line", ([*f"tune {TINY['tune']} --runs {10**12}".split()], [*DEFAULTS]))
def test_command_line_random(refresh, line):
    words, written = line
    folder = refresh()
    before = tree(folder)
    with soon("command lines", PATIENCE):
        result = CliRunner().invoke(main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), (words, result.exc_info)
    assert result.exit_code in (0, 2), result.output
    if result.exit_code:
        assert result.stderr.splitlines()[-1].startswith("Error: "), result.stderr
    for text in ("Traceback", "Glyph", "constrained_layout", "\x1b", "Warning: Error"):
        assert text not in result.output
    after = tree(folder)
    touched = [path for path in {*before, *after} if before.get(path, 0) != after.get(path, 0)]
    allowed = [os.path.realpath(path) for path in written]
    own = [
        path
        for path in touched
        if any(f"{each}/".startswith(f"{path}/") or str(path).startswith(each) for each in allowed)
    ]
    assert set(touched) == set(own), words
