import os

import pytest
from one_thread import _one_thread  # noqa: F401

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.register_assert_rewrite("reference_run")


def pytest_collection_modifyitems(items):
    """Ignore warnings of the libraries, not those of this package."""
    for item in items:
        if "integrations" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("error:.*:UserWarning:landscape"), append=False)
            item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)
