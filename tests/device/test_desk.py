"""The toy device itself: as strict as a GPU, and of no effect on tests that do not name it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn


def test_two_devices_are_refused_in_one_call(desks):
    a, b = (torch.ones(3, device=device) for device in desks)
    for wrong in (lambda: a + b, lambda: torch.stack([a, b]), lambda: a @ torch.ones(3), lambda: b.add_(a)):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (a + b.to(a.device)).device == desks[0]
    assert (b * torch.tensor(2.0)).device == desks[1]


WAITING = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "a branch": lambda x: bool(x.any()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a tensor of numbers": lambda x: torch.tensor([1.0], device=x.device),
    "indices of the host": lambda x: x[torch.tensor([0, 1])],
}
QUEUED = {
    "a sum": lambda x: x.sum(),
    "a number": lambda x: torch.full((), 2.0, device=x.device) * x / 3,
    "a copy that does not wait": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a copy to the other device": lambda x: x.to("desk:1"),
    "dropout": lambda x: F.dropout(x, 0.5),
    "a layer": lambda x: F.cross_entropy(F.linear(x[None], x[None]), torch.zeros(1, dtype=int, device=x.device) + 0),
}


@pytest.mark.parametrize("name", [*WAITING, *QUEUED])
def test_what_makes_the_host_wait_is_refused(name, device, forbids_waiting):
    if device.type == "cuda" and name == "a copy to the other device":
        pytest.skip("one GPU")
    x = torch.ones(3, device=device)
    with forbids_waiting():
        if name in WAITING:
            with pytest.raises(RuntimeError, match="synchroniz"):
                WAITING[name](x)
        else:
            QUEUED[name](x)


def test_generator_of_the_host_is_refused(desks):
    with pytest.raises(RuntimeError, match="generator"):
        torch.randperm(5, generator=torch.Generator("cpu"), device=desks[0])


def test_random_numbers_are_of_one_device(desks):
    states = [torch.get_device_module(device).get_rng_state(device) for device in desks]
    before, first = torch.get_rng_state(), torch.rand(3, device=desks[0])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.desk.get_rng_state(desks[1]), states[1])
    torch.desk.set_rng_state(states[0], desks[0])
    assert torch.equal(torch.rand(3, device=desks[0]), first)
    torch.manual_seed(3)
    one = torch.rand(3, device=desks[1])
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3, device=desks[1]), one)
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(3, device=desks[0]).cpu(), one.cpu())
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(3), one.cpu())


def test_dropout_is_a_kernel_of_its_own(desks):
    x = torch.ones(64, device=desks[0])
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    drawn = torch.empty_like(x).bernoulli_(0.5) * 2
    assert not torch.equal(dropped, drawn)
    assert set(dropped.tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", ["linear", "convolution", "transposed", "batch norm", "views"])
def test_derivatives_are_those_of_the_cpu(name, desks):
    torch.manual_seed(0)
    model = {
        "linear": nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.GELU(), nn.LayerNorm(5)),
        "convolution": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(inplace=True)),
        "transposed": nn.ConvTranspose2d(3, 2, 2),
        "batch norm": nn.BatchNorm2d(3),
        "views": nn.Sequential(nn.Unflatten(2, (2, 2)), nn.Flatten(3), nn.Linear(8, 2)),
    }[name].double()
    x, found = torch.randn(6, 3, 4, 4, dtype=torch.float64), []
    for device in ("cpu", desks[1]):
        model.zero_grad()
        model.to(device)
        y = model(x.to(device))
        y.square().sum().backward()
        found.append([y.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_other_tests_do_not_see_it(device):
    """As soon as no test uses it, nothing of torch that does not name it has changed."""
    if device.type == "cuda":
        pytest.skip("is about the toy device")
    torch.desk.set_available(False)
    assert not torch.accelerator.is_available()
    assert torch.get_default_device() == torch.device("cpu")
    assert not torch.is_autocast_enabled("cpu")
    torch.manual_seed(0)
    numbers = torch.rand(2)
    torch.manual_seed(0)
    torch.rand(5, device=device)
    assert torch.equal(torch.rand(2), numbers)
    with torch.random.fork_rng():
        torch.rand(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype is torch.bfloat16
    loader = torch.utils.data.DataLoader(range(4), batch_size=2)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_threads_have_a_current_device_each(desks):
    """Autograd differentiates on each device in a thread of its own, which makes that device its current one."""
    for _ in range(20):
        leaves = [torch.ones(3, device=device, requires_grad=True) for device in desks]
        parts = [(leaf / 2).square().mean() for leaf in leaves]
        (parts[0] + parts[1].to(desks[0])).backward()
        assert [leaf.grad.tolist() for leaf in leaves] == [[pytest.approx(1 / 6)] * 3] * 2
        assert torch.desk.current_device() == 0
        assert torch.ones(1, device="desk").device == desks[0]
