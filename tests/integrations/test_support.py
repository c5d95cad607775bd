"""Libraries that are not installed."""

import importlib
import os
import sys

import pytest

from landscape.errors import MissingExtraError
from landscape.integrations.support import check_options

HOSTS = {"accelerate": "accelerate", "lightning": "lightning.pytorch", "transformers": "transformers"}


@pytest.mark.parametrize("extra", HOSTS)
def test_missing_library_names_its_extra(extra, monkeypatch):
    monkeypatch.setitem(sys.modules, HOSTS[extra], None)
    name = f"landscape.integrations.{extra}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingExtraError, match=rf"\[{extra}\]"):
        importlib.import_module(name)


@pytest.mark.parametrize("extra", HOSTS)
def test_libraries_installed(extra):
    """CI installs the extra ``field``, and sets LANDSCAPE_FIELD to require it."""
    if not os.environ.get("LANDSCAPE_FIELD"):
        pytest.skip("LANDSCAPE_FIELD is not set, so that other libraries need not be installed")
    assert importlib.import_module(f"landscape.integrations.{extra}")


def test_misspelt_option_is_named_with_those_that_exist():
    with pytest.raises(TypeError, match=r"'step_size'.*step_sizes"):
        check_options({"step_size": [0.1]})
    check_options({"step_sizes": [0.1], "trace": "folder"})
