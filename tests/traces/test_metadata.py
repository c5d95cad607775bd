import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from landscape.errors import LandscapeError
from landscape.traces.metadata import environment, plain


@pytest.mark.parametrize(
    ("fact", "expected"),
    [
        (True, True),
        (None, None),
        (Path("a") / "b", str(Path("a") / "b")),
        ((1, (2.5, "x")), [1, [2.5, "x"]]),
        (np.float32(0.5), 0.5),
        (np.array([[1, 2]]), [[1, 2]]),
        (float("nan"), "nan"),
        (np.array([1.0, -np.inf]), [1.0, "-inf"]),
        ({"lr": {1: np.int64(3)}}, {"lr": {"1": 3}}),
    ],
)
def test_plain_values(fact, expected):
    result = plain(fact)
    assert result == expected
    assert json.loads(json.dumps(result, allow_nan=False)) == expected


def test_plain_names_unsupported_value():
    with pytest.raises(LandscapeError, match=r"recipe\.layers\[1\]: .*object"):
        plain({"recipe": {"layers": [1, object()]}})


def git(*arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def test_environment_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert environment()["git"] is None
    git("init")
    Path("code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    Path("trace.parquet").write_text("untracked files do not count as changes")
    assert environment()["git"]["dirty"] is False
    assert len(environment()["git"]["commit"]) == 40
    Path("code.py").write_text("2")
    assert environment()["git"]["dirty"] is True


def test_environment_versions():
    assert environment()["versions"]["numpy"] == np.__version__
