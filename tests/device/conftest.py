"""Accelerators: the toy device of ``tests/helpers/desk``, of which there are two, and a GPU if there is one."""

from contextlib import contextmanager

import desk
import pytest
import torch


@pytest.fixture(scope="session")
def _built():
    try:
        return desk.load()
    except desk.MissingCompilerError as error:
        pytest.skip(str(error))


@pytest.fixture
def desks(_built):
    """The two toy devices, which other tests of the process do not see."""
    _built.set_available(True)
    _built.manual_seed_all(0)
    yield [torch.device("desk", index) for index in range(desk.COUNT)]
    _built.set_sync_debug_mode("default")
    _built.set_device(0)
    _built.set_available(False)


@pytest.fixture(params=["desk", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """An accelerator."""
    if request.param == "desk":
        return request.getfixturevalue("desks")[0]
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    return torch.device("cuda", 0)


@pytest.fixture
def forbids_waiting(device):
    """Return a context in which the host must not wait for the device."""
    module = torch.get_device_module(device)

    @contextmanager
    def forbidden():
        module.set_sync_debug_mode("error")
        try:
            yield
        finally:
            module.set_sync_debug_mode("default")

    return forbidden
