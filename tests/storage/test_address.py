"""Addresses as users write them: home folders, URLs through pathlib, empty parts, credentials."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from landscape_cli.main import main

from landscape.errors import LandscapeError
from landscape.files import expand_user, is_url, temporary_name, whole_file
from landscape.storage.address import inside, local_path, normalized, outer_and_name
from landscape.storage.filesystem import Folder, store_at
from landscape.text import without_secrets
from landscape.traces.folder import TraceFolder
from landscape.traces.reader import read_traces
from landscape.traces.writer import TraceWriter


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("kind", [str, Path])
def test_home_folder(home, kind):
    with TraceWriter(kind("~/runs/a")) as trace:
        trace.append({"step": 3})
    assert (home / "runs/a/run.json").is_file()
    assert trace.location == str(home / "runs/a")
    assert list(read_traces(home / "runs").step) == [3]
    assert inside(kind("~"), "a") == home / "a"
    assert not Path("~").exists()


def test_home_folder_on_the_command_line(home):
    command = ["probe", "--epochs", "1", "--norm", "none", "--train-samples", "300", "--device", "cpu"]
    result = CliRunner().invoke(main, [*command, "--out=~/runs"])
    assert result.exit_code == 0, result.output
    assert len(list(home.glob("runs/*/run.json"))) == 1
    result = CliRunner().invoke(main, ["figure", "1", "--out=~/figures"])
    assert result.exit_code == 0, result.output
    assert (home / "figures/figure1.png").exists()


def test_home_folder_is_unknown(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does for a user id without a name
    for location in ("~/runs", Path("~")):
        with pytest.raises(LandscapeError, match=f"^{location}: .*HOME"):
            normalized(location)


def test_home_folder_of_unknown_user_is_a_name():
    assert expand_user("~nobody-has-this-name/runs") == Path("~nobody-has-this-name/runs")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("s3://bucket/run", "s3://bucket/run"),
        (Path("s3://bucket/run"), "s3://bucket/run"),
        (Path("s3://bucket") / "run", "s3://bucket/run"),
        ("S3://bucket/run", "s3://bucket/run"),
        ("s3://bucket//run/", "s3://bucket/run"),
        ("s3://bucket/traces//试验 1", "s3://bucket/traces/试验 1"),
        ("s3://bucket", "s3://bucket"),
        ("gs://anonymous@bucket//run/?scheme=http", "gs://anonymous@bucket/run?scheme=http"),
        (Path("gs://bucket/run"), "gs://bucket/run"),
        ("abfs://container@account.dfs.core.windows.net//run", "abfs://container@account.dfs.core.windows.net/run"),
        ("hdfs:///user/me", "hdfs:///user/me"),
        (Path("file:///data/run"), "file:///data/run"),
        ("file:///data//run", "file:///data/run"),
    ],
)
def test_normalized_url(written, meant):
    assert normalized(written) == meant
    assert normalized(meant) == meant


@pytest.mark.parametrize("path", ["traces", "a/b://c", "C:/traces", "s3", "s3:run", "exp:/1", "./s3:/bucket", "x?a=b"])
def test_paths_are_no_urls(path):
    assert not is_url(path)
    assert normalized(path) == Path(path)
    assert isinstance(store_at(path), Folder)


@pytest.mark.parametrize(
    "location", ["", "a\0b", "s3://", "s3:///run", "gs:///run", "file://host/run", "file://traces"]
)
def test_incomplete_address(location):
    with pytest.raises(LandscapeError):
        normalized(location)


def test_file_url(tmp_path):
    for location in (f"file://{tmp_path}/a b", Path(f"file://{tmp_path}/a b"), f"file://{tmp_path}/a%20b"):
        assert str(store_at(location)) == str(tmp_path / "a b")


def test_inside_keeps_options():
    assert inside("gs://bucket/traces/?project_id=p", "run") == "gs://bucket/traces/run?project_id=p"
    assert outer_and_name("gs://bucket/traces/run?project_id=p") == ("gs://bucket/traces?project_id=p", "run")
    assert TraceFolder("gs://anonymous@bucket/run?scheme=http").name == "run"


CREDENTIALS = [
    "s3://AKIAKEY:hidden/se@cret@bucket/run",
    "s3://hiddenkey@bucket/run",
    "s3://bucket:hidden/run",
    "s3://bucket/run?access_key=hidden1&secret_key=hidden2",
    "gs://bucket/run?access_token=hidden",
    "abfs://container:hidden@account.dfs.core.windows.net/run",
    "abfs://container@account.blob.core.windows.net/run?sv=2024&sig=hidden",
    "https://bucket.s3.amazonaws.com/run?X-Amz-Credential=hidden&X-Amz-Signature=hidden",
]


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("url", CREDENTIALS)
def test_credentials_are_refused_and_never_printed(url, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    location = kind(url)
    for use in (TraceWriter, read_traces, TraceFolder, normalized, lambda location: inside(location, "run")):
        with pytest.raises(LandscapeError, match=r"credentials.*\.aws/credentials") as caught:
            use(location)
        error = caught.value
        while error is not None:
            assert "hidden" not in f"{error!s} {error!r}"
            error = error.__cause__ or error.__context__
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command", [["plot"], ["list"], ["probe", "--out"], ["tune", "--out"], ["figure", "1", "--out"]]
)
@pytest.mark.parametrize("url", CREDENTIALS)
def test_credentials_on_the_command_line(url, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [*command, url])
    assert result.exit_code == 2
    assert "hidden" not in result.output
    assert not list(tmp_path.iterdir())


@given(st.text(min_size=1), st.text())
def test_password_of_any_characters(password, path):
    password = f"hidden{password}hidden"
    assert "hidden" not in without_secrets(f"postgresql://me:{password}@host/{path.replace('hidden', '')}")
    assert without_secrets("postgresql://me@host:5432/tuning") == "postgresql://me@host:5432/tuning"


@pytest.mark.parametrize("option", ["--out", "--data-dir"])
@pytest.mark.parametrize("url", ["s3://bucket/run", "s3:/bucket/run", "gs://bucket/run"])
def test_folders_of_this_machine_are_no_urls(option, url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["tune", "--plan", option, url])
    assert (result.exit_code, result.output.count("Error: ")) == (2, 1)
    assert option in result.output
    assert not list(tmp_path.iterdir())
    with pytest.raises(LandscapeError, match=option):
        local_path(Path(url), option)


@pytest.mark.parametrize("name", ["n" * 200, "n" * 255, "试" * 66, "试" * 85, "é" * 127, "试" * 84 + ".md"])
def test_long_names(name, tmp_path):
    with whole_file(tmp_path / name) as file:
        file.write(b"whole")
    assert (tmp_path / name).read_bytes() == b"whole"
    assert os.listdir(tmp_path) == [name]
    assert len(os.fsencode(temporary_name(Path(name)).name)) <= 255
    (tmp_path / name).unlink()
    with TraceWriter(tmp_path / name) as trace:
        trace.append({"step": 0})
    assert list(read_traces(tmp_path).run) == [name]


def test_name_too_long_is_refused_in_one_line(tmp_path):
    for use in (TraceWriter, read_traces):
        with pytest.raises(LandscapeError, match="name too long"):
            use(tmp_path / ("试" * 200))


READ_ONLY = """
import os, sys, tempfile
from click.testing import CliRunner
from landscape_cli.main import main
os.chdir(sys.argv[1])
command = ["probe", "--epochs", "1", "--norm", "batch", "--train-samples", "300", "--device", "cpu", "--out", "traces"]
for args in (command, ["plot", "traces"], ["list", "traces"]):
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
"""


@pytest.mark.root
def test_user_without_home_and_read_only_installation(tmp_path):
    """The digits need no cache, and nothing is written to the package."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("only root can mount the installation read-only")
    package = Path(sys.modules["landscape"].__file__).parent
    mount = f"mount --bind {package} {package} && mount -o remount,ro,bind {package} && ! touch {package}/written && "
    drop = (
        "setpriv --reuid=12345 --regid=12345 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
    )
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    (tmp_path / "work").mkdir()
    (tmp_path / "work").chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o755)
    command = f"{mount} {drop} {sys.executable} - {tmp_path / 'work'}"
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command], input=READ_ONLY, text=True, capture_output=True, env=environment
    )
    assert result.returncode == 0, result.stderr
