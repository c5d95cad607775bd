"""A fixture for folders and files whose models are small."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, because small models are slower with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
