import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.register_assert_rewrite("reference_run")


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, because small models are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items):
    """Ignore warnings of the libraries, not those of this package."""
    for item in items:
        if "integrations" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("error:.*:UserWarning:landscape"), append=False)
            item.add_marker(pytest.mark.filterwarnings("ignore"), append=False)
