"""The probe on an accelerator: its rows beside a slow twin, and a host that never waits for the device."""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from cases import CASES
from torch import nn
from twin import STEP_SIZES, check_rows, train

from benchmarks.launches import count_update
from benchmarks.workloads import WORKLOADS
from landscape import LandscapeProbe, make_norm
from landscape.training.models import SimpleNet

CRITERION = nn.CrossEntropyLoss()
ENGINES = ["tape", "loop"]


def batches(device, updates=4, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(updates, 12, 6, dtype=dtype, generator=generator).to(device)
    return [(x, torch.arange(12, device=device) % 3) for x in numbers]


def loss_of(model, batch):
    return CRITERION(model(batch[0]), batch[1])


def network(norm="batch", dropout=0.0):
    torch.manual_seed(0)
    options = {"ghost": {"groups": 3}, "seq": {"groups": 3, "channel_groups": 2}}.get(norm, {})
    return nn.Sequential(
        nn.Linear(6, 8), make_norm(norm, **options)(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
    )


def taken(engine):
    """Return what makes the probe use an engine."""
    return {"engine": engine, "criterion": CRITERION if engine == "loop" else None}


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=0.01, capturable=True),
    "a tensor as learning rate": lambda p: torch.optim.Adam(
        p := list(p), lr=torch.tensor(0.01, device=p[0].device), capturable=True
    ),
    "fused, with a tensor": lambda p: torch.optim.Adam(
        p := list(p), lr=torch.tensor(0.01, device=p[0].device), fused=True
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("norm", ["none", "batch", "ghost", "seq"])
def test_rows_equal_moved_copies(norm, dropout, engine, device):
    model = network(norm, dropout).double().to(device)
    probe, expected = train(model, loss_of, batches(device), **taken(engine))
    frame = check_rows(probe, expected)
    assert set(frame["engine"]) == {engine}
    assert all(losses[1] != losses[2] for losses in expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name, engine, device):
    model = network().double().to(device)
    probe, expected = train(model, loss_of, batches(device), OPTIMIZERS[name], **taken(engine))
    check_rows(probe, expected)
    assert probe.frame()["lr"].tolist() == pytest.approx([0.1 if name == "SGD" else 0.01] * 4, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"gradients": True}, {"direction": "update"}], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_training_has_the_same_bits(engine, options, device):
    states = []
    for probed in (True, False):
        model = network("ghost", dropout=0.4).to(device)
        torch.manual_seed(2)
        train(model, loss_of, batches(device, dtype=torch.float32), probed=probed, **taken(engine), **options)
        states.append([*model.state_dict().values(), torch.rand(5, device=device), torch.rand(5)])
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize(
    "options",
    [{}, {"gradients": True}, {"direction": "update"}, {"overhead": 100.0}, {"every": 2}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_host_does_not_wait(engine, name, options, device, forbids_waiting):
    model = network("ghost", dropout=0.4).to(device)
    arguments = {"make": OPTIMIZERS[name], **taken(engine), **options}
    probe, _ = train(
        model, loss_of, batches(device, 9, dtype=torch.float32), checks_from=5, forbidden=forbids_waiting, **arguments
    )
    assert len(probe.frame()) == (5 if "every" in options else 9)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["transformer", "weight norm", "spectral norm", "in-place", "ResNet-20 seq"])
def test_the_host_does_not_wait_for_models(name, engine, device, forbids_waiting):
    with device:
        case = CASES[name]()
    options = {"engine": engine, "observes": engine == "loop", "forbidden": forbids_waiting}
    probe, expected = train(case.model, lambda model, batch: case.closure(model), range(7), checks_from=5, **options)
    frame = probe.frame()
    assert len(frame) == 7
    assert set(frame["engine"]) == {engine}
    assert len(expected) == 5
    for found, losses in zip(frame["losses"], expected, strict=False):
        assert list(found) == pytest.approx(losses, rel=1e-8)


def test_the_host_does_not_wait_with_a_scaler(device, forbids_waiting):
    """A fused optimizer skips an update without telling the host."""
    model = network().to(device)
    optimizer, scaler = torch.optim.Adam(model.parameters(), lr=0.01, fused=True), torch.amp.GradScaler(device.type)
    x, y = batches(device, dtype=torch.float32)[0]
    with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES) as probe:
        for update in range(10):
            loss = scaler.scale(loss_of(model, (x, y)))
            factor = torch.full((), float("inf") if update in (6, 7) else 1.0, device=device)
            if update == 5:
                torch.get_device_module(device).set_sync_debug_mode("error")
            optimizer.zero_grad()
            (loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        torch.get_device_module(device).set_sync_debug_mode("default")
    frame = probe.frame()
    assert list(frame["step"]) == [0, 1, 2, 3, 4, 5, 8, 9]
    assert frame["loss_min"].notna().all()


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_of_the_device(engine, device):
    """Points differ from moved copies by the rounding of half precision alone."""
    model = network("ghost", dropout=0.4).to(device)

    def loss(model, batch):
        with torch.autocast(device.type, torch.bfloat16):
            return loss_of(model, batch)

    probe, expected = train(model, loss, batches(device, dtype=torch.float32), **taken(engine))
    check_rows(probe, expected, rel=2e-2)
    assert probe.trace._metadata["checks"]["gradient"]["tolerance"] == 5e-2  # that of half precision


def test_relative_step_sizes_read_a_tensor(device):
    rate = torch.tensor(0.01, device=device)
    model = network().double().to(device)
    probe, _ = train(
        model,
        loss_of,
        batches(device),
        lambda p: torch.optim.Adam(p, lr=rate, capturable=True),
        step_sizes=[0.5, 2.0],
        relative=True,
    )
    assert probe.frame()["step_sizes"].map(list).tolist() == [pytest.approx([0.005, 0.02], rel=1e-6)] * 4


def test_learning_rate_of_the_first_group_that_moves(device, forbids_waiting):
    """Tensors of a device and numbers may be mixed; a row has the rate from before the scheduler's step."""
    model = network("none").to(device)
    zero, rate = (torch.tensor(value, device=device) for value in (0.0, 0.25))
    groups = [
        {"params": [model[0].weight], "lr": zero},
        {"params": [model[0].bias], "lr": 0.0},
        {"params": model[4].parameters(), "lr": rate},
    ]
    optimizer = torch.optim.Adam(groups, capturable=True)
    x, y = batches(device, dtype=torch.float32)[0]
    with LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, direction="update") as probe:
        for update in range(4):
            with forbids_waiting() if update else nullcontext():
                optimizer.zero_grad()
                loss_of(model, (x, y)).backward()
                optimizer.step()
                rate.mul_(0.5)
    assert probe.frame()["lr"].tolist() == [0.25, 0.125, 0.0625, 0.03125]


class Split(nn.Module):
    """A model whose layers are on two devices, and whose output is on the second one."""

    def __init__(self, first, second, norm="batch", dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), make_norm(norm)(8), nn.Dropout(dropout)).double().to(first)
        self.second = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)).double().to(second)
        self.device = second

    def forward(self, x):
        return self.second(self.first(x).to(self.device))


def split_loss(model, batch):
    return CRITERION(model(batch[0]), batch[1].to(model.device))


@pytest.mark.parametrize("options", [{}, {"gradients": True}, {"direction": "update"}], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("places", ["desk:0 desk:1", "desk:1 desk:0", "desk:1 cpu", "cpu desk:0"])
def test_model_on_two_devices(places, engine, options, desks):
    first, second = map(torch.device, places.split())
    model = Split(first, second, dropout=0.3 if "cpu" not in places else 0.0)
    probe, expected = train(model, split_loss, batches(first), **taken(engine), **options)
    if "direction" not in options:
        frame = check_rows(probe, expected)
        one = copy.deepcopy(model).cpu()
        for module in one.modules():
            module.device = torch.device("cpu")
        assert len(frame) == 4
    assert probe.frame()["grad_norm"].notna().all()
    if "gradients" in options:
        assert [row[0] for row in probe.frame()["gradient_distances"]] == pytest.approx([0.0] * 4, abs=1e-9)


@pytest.mark.filterwarnings("ignore:The optimizer's gradient is not")
@pytest.mark.parametrize("changed", [False, True])
def test_numbers_of_a_split_model_are_those_of_one_device(changed, desks):
    """Norms, slopes and the part of the gradient that is not the loss's are sums over both devices."""
    frames = []
    for first, second in (desks, ("cpu", "cpu")):
        model = Split(first, second)

        def loss(model, batch):
            loss = split_loss(model, batch)
            return loss + 1e-2 * sum(p.square().sum().to(loss.device) for p in model.parameters())

        between = (
            (lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01)) if changed else (lambda model: None)
        )
        probe, _ = train(model, loss, batches(first), gradients=True, between=between)
        frames.append(probe.frame())
    assert (frames[0]["gradient_rest"].min() > 0.01) == changed
    for name in ("loss", "grad_norm", "slope", "direction_norm", "gradient_rest"):
        assert frames[0][name].tolist() == pytest.approx(frames[1][name].tolist(), rel=1e-9, abs=1e-12), name
    for name in ("losses", "gradient_distances", "gradient_cosines"):
        for one, other in zip(frames[0][name], frames[1][name], strict=True):
            assert list(one) == pytest.approx(list(other), rel=1e-7, abs=1e-9), name


@pytest.mark.parametrize("engine", ENGINES)
def test_the_host_does_not_wait_for_two_devices(engine, desks):
    model = Split(*desks, dropout=0.3)

    @contextmanager
    def forbidden():
        torch.desk.set_sync_debug_mode("error")
        yield
        torch.desk.set_sync_debug_mode("default")

    data = [(x, y.to(desks[1])) for x, y in batches(desks[0], 8)]
    probe, _ = train(model, split_loss, data, checks_from=5, forbidden=forbidden, **taken(engine))
    assert len(probe.frame()) == 8


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("passes", ["one", "two", "list"])
def test_losses_on_two_devices(passes, engine, desks):
    """Of one backward pass of both, or of one of each."""
    first, second = desks
    model = Split(first, second)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = LandscapeProbe(
        model, optimizer, CRITERION if engine == "loop" else None, step_sizes=[0.0, 0.1], engine=engine
    )
    x, y = batches(first)[0]
    before = copy.deepcopy(model)

    def losses(model):
        early = model.first(x)
        return CRITERION(model(x), y.to(second)), early.square().mean()

    if engine == "loop" and passes != "two":
        pytest.skip("the loop takes one loss of each backward pass")
    with probe:
        if engine == "loop":
            probe.observe(lambda model: losses(model)[0]).backward()
            probe.observe(lambda model: losses(model)[1]).backward()
        elif passes == "two":
            for at in range(2):
                losses(model)[at].backward()
        elif passes == "list":
            torch.autograd.backward(list(losses(model)))
        else:
            a, b = losses(model)
            (a + b.to(second)).backward()
        with torch.no_grad():
            for parameter, trained in zip(before.parameters(), model.parameters(), strict=True):
                parameter -= 0.1 * trained.grad
        optimizer.step()
    expected = [loss.item() for loss in losses(before)]
    assert probe.last()["losses"][1] == pytest.approx(sum(expected), rel=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_masks_are_repeated(engine, device):
    """Those of the fused kernel: the loss at step size 0 has the bits of the training loss, at every update."""
    model = SimpleNet(6, 3, make_norm("none")).to(device)
    model.layers.append(nn.Dropout(0.5))
    data = batches(device, 6, dtype=torch.float32)
    probe, _ = train(model, loss_of, data, step_sizes=[0.0, 0.1], **taken(engine))
    frame = probe.frame()
    found = [losses[0] for losses in frame["losses"]]
    assert found == frame["loss"].tolist() if device.type == "desk" else found == pytest.approx(frame["loss"].tolist())
    assert len(set(found)) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_default_device_does_not_matter(engine, device):
    """A loop may make all tensors on another device than the model's."""
    frames = []
    for default in ("cpu", device):
        model = network("ghost", dropout=0.4).double()
        data = batches("cpu")
        torch.manual_seed(2)
        with torch.device(default):
            probe, _ = train(model, loss_of, data, **taken(engine))
            frames.append(probe.frame())
    assert frames[0]["losses"].map(list).tolist() == frames[1]["losses"].map(list).tolist()


def test_default_device_makes_no_host_wait(device, forbids_waiting):
    model = network("ghost", dropout=0.4).to(device)
    data = batches(device, 8, dtype=torch.float32)
    with device:
        probe, _ = train(model, loss_of, data, checks_from=5, forbidden=forbids_waiting)
    assert len(probe.frame()) == 8


def test_state_is_resumed(device):
    """The rows after a checkpoint are those of an uninterrupted run."""
    data, whole = batches(device, 6), network("ghost", dropout=0.4).double().to(device)
    torch.manual_seed(2)
    expected = train(whole, loss_of, data)[0].frame()
    model = network("ghost", dropout=0.4).double().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(2)
    first, _ = train(model, loss_of, data[:3], lambda _: optimizer)
    states = [copy.deepcopy(one.state_dict()) for one in (model, optimizer, first)]
    generator = torch.get_device_module(device).get_rng_state(device)
    torch.rand(3, device=device)
    torch.get_device_module(device).set_rng_state(generator, device)
    resumed = network("ghost", dropout=0.4).double().to(device)
    other = torch.optim.SGD(resumed.parameters(), lr=0.1, momentum=0.9)
    probe = LandscapeProbe(resumed, other, step_sizes=STEP_SIZES)
    for one, state in zip((resumed, other, probe), states, strict=True):
        one.load_state_dict(state)
    torch.get_device_module(device).set_rng_state(generator, device)
    with probe:
        for batch in data[3:]:
            other.zero_grad()
            loss_of(resumed, batch).backward()
            other.step()
    assert probe.frame()["losses"].map(list).tolist() == expected["losses"].map(list).tolist()[3:]


@pytest.mark.parametrize("norm", ["none", "batch", "ghost"])
def test_launches_of_an_update(norm, device):
    """Besides those of K forward passes there are some that move parameters, and some that make the row."""
    counts = count_update(WORKLOADS[f"simplenet-{norm}"], 64, str(device))
    assert counts["probe, tape"] < counts["K passes"] + 50
    assert counts["K passes"] <= counts["probe, loop"] < counts["K passes"] + 100


def test_launches_are_what_the_device_counts(desks):
    """A mode of torch counts the calls that reach the device."""
    counted = count_update(WORKLOADS["simplenet-none"], 64, "desk")
    model, data = SimpleNet(784, 10, make_norm("none")).to("desk"), torch.randn(64, 784).to("desk")
    targets = torch.zeros(64, dtype=torch.int64).to("desk")
    CRITERION(model(data), targets)
    before = torch.desk.launches()
    CRITERION(model(data), targets)
    assert torch.desk.launches() - before == counted["forward"]
