"""Traces on object storage, tested with a local server of the S3 protocol."""

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from landscape_cli.main import main
from pyarrow import fs
from recordings import rows
from torch import nn

from landscape import RECIPES, LandscapeProbe, plot_landscape, train
from landscape.errors import LandscapeError
from landscape.storage import filesystem
from landscape.storage.aws import s3_endpoint, s3_region
from landscape.storage.filesystem import ObjectStore, store_at
from landscape.traces.reader import list_runs, read_traces
from landscape.traces.writer import TraceWriter

TRACES = "s3://bucket/traces"


@pytest.fixture(scope="module")
def server():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dependencies of the server warn.
        moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").disabled = True
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    # A restarted server has the same address and the same objects.
    server._ip_address, server._port = server.get_host_and_port()
    yield server
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = boto3.resource("s3").create_bucket(Bucket="bucket")
    yield bucket
    bucket.objects.all().delete()


def names(bucket):
    """Return the names of objects, without those that represent folders."""
    return sorted(found.key for found in bucket.objects.all() if not found.key.endswith("/"))


def record(trace, steps):
    for step in steps:
        trace.append({**rows(steps=100)[step], "step": step})


def test_s3_round_trip(bucket):
    for name in ("a", "b"):
        with TraceWriter(f"{TRACES}/{name}", {"norm": name}, flush_rows=4) as trace:
            record(trace, range(10))
    assert names(bucket)[:4] == ["traces/a/run.json", *(f"traces/a/updates-00000000{n}.parquet" for n in (0, 4, 8))]
    assert len(names(bucket)) == 8
    frame = read_traces(TRACES)
    assert list(frame.run.unique()) == ["a", "b"]
    assert list(frame.step) == 2 * list(range(10))
    assert len(read_traces(f"{TRACES}/a/updates-000000004.parquet")) == 4
    assert list(list_runs(TRACES).updates) == [10, 10]
    assert plot_landscape(frame).axes


def test_s3_lock_overwrite_resume(bucket):
    trace = TraceWriter(f"{TRACES}/run")
    record(trace, range(3))
    trace.flush()
    with pytest.raises(LandscapeError, match=rf"process {os.getpid()} on host {platform.node()}"):
        TraceWriter(f"{TRACES}/run", resume=True)
    trace.close()
    with pytest.raises(LandscapeError, match="holds a run"):
        TraceWriter(f"{TRACES}/run")
    with TraceWriter(f"{TRACES}/run", resume=True) as trace:
        trace.truncate({"updates": 2})
        record(trace, range(2, 5))
        trace.write_file("checkpoint.pt", b"state")
        assert trace.read_file("checkpoint.pt") == b"state"
        trace.delete_file("checkpoint.pt")
        assert trace.read_file("checkpoint.pt") is None
    assert list(read_traces(TRACES).step) == list(range(5))
    with TraceWriter(f"{TRACES}/run", overwrite=True) as trace:
        record(trace, range(1))
    assert list(read_traces(TRACES).step) == [0]


def test_s3_outage_during_training(server, bucket):
    """Training continues, and its rows are written when the server is back."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    criterion, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)

    def train(updates):
        for _ in range(updates):
            optimizer.zero_grad()
            criterion(model(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
            optimizer.step()

    probe = LandscapeProbe(model, optimizer, criterion, step_sizes=[0.1], engine="loop", trace=f"{TRACES}/run")
    with probe:
        train(5)
        assert probe.trace.flush()
        server.stop()
        train(5)
        with pytest.warns(UserWarning, match="s3://bucket/traces/run: cannot be written to: .*Training continues"):
            assert not probe.trace.flush()
        train(5)
        assert not probe.trace.flush()
        with pytest.raises(LandscapeError, match="s3://bucket/traces/run: cannot be read now"):
            probe.frame()
        server.start()
        assert len(probe.frame()) == 15
        assert probe.trace.flush()
        train(5)
    assert list(read_traces(TRACES).step) == list(range(20))


def test_s3_outage_at_end(server, bucket):
    trace = TraceWriter(f"{TRACES}/run")
    record(trace, range(2))
    trace.flush()
    server.stop()
    record(trace, range(2, 5))
    with (
        pytest.warns(UserWarning, match="cannot be written to"),
        pytest.raises(LandscapeError, match="3 rows of updates could not be written"),
    ):
        trace.close()
    with pytest.raises(LandscapeError, match="s3://bucket/traces: cannot be read"):
        read_traces(TRACES)
    server.start()
    trace.close()
    assert list(read_traces(TRACES).step) == list(range(5))


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3://", "names no bucket"),
        ("s4://bucket/run", "s4://bucket/run: cannot be used"),
        ("s3://missing/run", "s3://missing/run: .*bucket does not exist"),
    ],
)
def test_s3_unusable_url(bucket, location, message):
    with pytest.raises(LandscapeError, match=message):
        TraceWriter(location)


def test_s3_nothing_there(bucket):
    with pytest.raises(LandscapeError, match="s3://bucket/nothing: does not exist"):
        read_traces("s3://bucket/nothing")


def test_s3_store_equals_folder(bucket, tmp_path):
    """The same calls return the same results."""
    results = []
    for store in (store_at(tmp_path / "place"), store_at(f"{TRACES}/place")):
        store.create()
        inner = store.inside("inner")
        inner.create()
        for name, content in {"b": b"1", "a": b"22"}.items():
            store.write(name, content)
            inner.write(name, content)
        store.write("a", b"333")
        store.remove("b")
        store.remove("never")
        with pytest.raises(FileNotFoundError):
            store.read("b")
        results.append((store.kind(), store.names(), store.tree(print), store.read("a"), inner.read("b")))
        assert (store.inside("none").kind(), store.inside("none").names()) == (None, [])
    assert results[0] == results[1]


def test_s3_command_resumes(bucket):
    recipe = replace(RECIPES["digits"], epochs=1)

    def stop(probe):
        if probe.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, TRACES, device="cpu", on_update=stop)
    assert f"traces/{recipe.run_name}/checkpoint.pt" in names(bucket)
    command = ["probe", "--norm", "batch", "--epochs", "1", "--device", "cpu", "--resume", "--out", TRACES]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{TRACES}/{recipe.run_name}: mean range ")
    assert names(bucket) == [
        f"traces/{recipe.run_name}/{name}"
        for name in (
            "epochs-000000000.parquet",
            "run.json",
            "updates-000000000.parquet",
            "updates-000000007.parquet",
        )
    ]
    assert list(read_traces(TRACES).step) == list(range(11))


@pytest.fixture
def aws_files(server, bucket, monkeypatch, tmp_path):
    """A home folder for the files of AWS's tools, and an environment without variables of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("[default]\naws_access_key_id=a\naws_secret_access_key=hidden%\n")
    host, port = server.get_host_and_port()

    def write(text, name="config"):
        (tmp_path / ".aws" / name).write_text(text.replace("URL", f"http://{host}:{port}"))

    return write


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("config", "environment"),
    [
        ("[default]\nregion = us-east-1\nendpoint_url = URL\n", {}),
        (f"[default]\nendpoint_url = {NOWHERE}\n[profile other]\nendpoint_url = URL\n", {"AWS_PROFILE": "other"}),
        (
            "[default]\nservices = local\n\n[services local]\nec2 =\n  endpoint_url = x\ns3 =\n  endpoint_url = URL\n",
            {},
        ),
        (
            f"[default]\nendpoint_url = {NOWHERE}\nservices = local\n[services local]\ns3 =\n  endpoint_url = URL\n",
            {},
        ),
    ],
)
def test_s3_endpoint_of_the_config_file(aws_files, bucket, monkeypatch, config, environment):
    aws_files(config)
    if environment:
        aws_files("[other]\naws_access_key_id=a\naws_secret_access_key=b\n", "credentials")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import boto3

    expected = boto3.session.Session().client("s3", region_name="us-east-1").meta.endpoint_url
    assert s3_endpoint() == expected
    with TraceWriter(f"{TRACES}/run") as trace:
        record(trace, range(2))
    assert list(read_traces(TRACES).step) == [0, 1]


def test_s3_environment_precedes_the_config_file(aws_files, monkeypatch):
    aws_files("[default]\nendpoint_url = http://file\nregion = eu-central-1\n")
    assert (s3_endpoint(), s3_region()) == ("http://file", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert s3_endpoint() == "http://all"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert s3_endpoint() == "http://s3"
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert s3_endpoint() is None


@pytest.mark.parametrize("content", ["hidden key", "[default\nhidden", "\0", "[default]\n hidden\n= hidden"])
def test_s3_damaged_config_file(aws_files, content):
    aws_files(content)
    with pytest.raises(LandscapeError, match=r"\.aws.config") as caught:
        store_at(TRACES)
    assert "hidden" not in str(caught.value)


def test_s3_unknown_profile(aws_files, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(LandscapeError, match="AWS_PROFILE=absent"):
        store_at(TRACES)


def test_s3_endpoint_with_credentials(aws_files):
    aws_files("[default]\nendpoint_url = http://me:hidden@host\n")
    with pytest.raises(LandscapeError, match="credentials") as caught:
        store_at(TRACES)
    assert "hidden" not in str(caught.value)


def test_s3_options_of_the_address(server, bucket, monkeypatch):
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", NOWHERE)
    url = f"{TRACES}/run?endpoint_override=http://{host}:{port}&region=us-east-1"
    with TraceWriter(url) as trace:
        record(trace, range(2))
    assert "traces/run/run.json" in names(bucket)
    assert list(read_traces(url).run.unique()) == ["run"]
    with pytest.raises(LandscapeError, match="unknown_option"):
        store_at(f"{TRACES}?unknown_option=1")


@pytest.mark.parametrize(
    "location", ["s3://bucket//traces//run/", "s3:/bucket/traces/run", Path("s3://bucket/traces/run")]
)
def test_s3_address_as_written(bucket, location):
    with TraceWriter(location) as trace:
        record(trace, range(2))
    assert trace.location == "s3://bucket/traces/run"
    assert "traces/run/run.json" in names(bucket)
    assert list(read_traces(TRACES).run.unique()) == ["run"]


@pytest.mark.parametrize("name", ["试验 1", "a%20b", "a+b#c", "n" * 200])
def test_s3_names(bucket, name):
    with TraceWriter(f"{TRACES}/{name}") as trace:
        record(trace, range(2))
    assert f"traces/{name}/run.json" in names(bucket)
    assert list(read_traces(TRACES).run.unique()) == [name]


def test_s3_restarted_container(bucket):
    with TraceWriter(f"{TRACES}/run") as trace:
        record(trace, range(2))
    former = {"host": platform.node(), "process": os.getpid(), "token": "former", "time": time.time()}
    bucket.put_object(Key="traces/run/.owner.json", Body=json.dumps(former).encode())
    with TraceWriter(f"{TRACES}/run", resume=True) as trace:
        record(trace, range(2, 3))
    assert list(read_traces(TRACES).step) == [0, 1, 2]


@pytest.fixture
def silent_server():
    """Address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_gs_server_that_refuses(monkeypatch):
    monkeypatch.setattr(filesystem, "RETRY_SECONDS", 1)
    url = "gs://anonymous@bucket/traces?scheme=http&endpoint_override=127.0.0.1:9"
    for use in (read_traces, TraceWriter):
        with pytest.raises(LandscapeError) as caught:
            use(url)
        assert "no answer in" not in str(caught.value)  # The client ended its retries.


@pytest.mark.parametrize("name", ["试验 1", "a%zz", "a+b#c", "n" * 200])
def test_gs_names(name):
    store = store_at(f"gs://anonymous@bucket/traces/{name}")
    assert isinstance(store, ObjectStore)
    assert store._path == f"bucket/traces/{name}"


def test_gs_silent_server(silent_server, monkeypatch):
    monkeypatch.setattr(filesystem, "REQUEST_SECONDS", 1)
    url = f"gs://anonymous@bucket/traces?scheme=http&endpoint_override={silent_server}"
    with pytest.raises(LandscapeError, match="no answer in 1 s"):
        read_traces(url)
    with pytest.raises(LandscapeError, match="no answer in 1 s"):
        TraceWriter(url)


def test_abfs_silent_server(silent_server, monkeypatch):
    monkeypatch.setattr(filesystem, "REQUEST_SECONDS", 1)
    hosts = {"blob_storage_authority": silent_server, "dfs_storage_authority": silent_server}
    schemes = {"blob_storage_scheme": "http", "dfs_storage_scheme": "http"}
    system = fs.AzureFileSystem("account", account_key="c2VjcmV0", **hosts, **schemes)
    store = ObjectStore("abfs://container@account/run", system, "container/run", has_timeouts=False)
    for use in (store.kind, store.names, lambda: store.read("a"), lambda: store.write("a", b"")):
        with pytest.raises(TimeoutError):
            use()


def test_abfs_without_login():
    """Azure's client raises no OSError, and aborts the process if a file is opened."""
    url = "abfs://container@account/run?enable_tls=false&blob_storage_authority=127.0.0.1:9"
    code = f"from landscape import TraceWriter\nTraceWriter({url!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "LandscapeError: abfs://container@account/run" in result.stderr.splitlines()[-1]
