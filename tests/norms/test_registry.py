import copy
import pickle
from math import prod

import pytest
import torch
from torch import nn

from landscape.errors import LandscapeError
from landscape.names import NORMS, options_of
from landscape.norms.functional import batch_group_norm, ghost_mean_norm, ghost_norm, group_norm, seq_norm
from landscape.norms.layers import BatchNorm, GhostNorm, GroupNorm, SeqNorm
from landscape.norms.registry import REGISTRY, convert_norms, make_norm

NATIVE = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(12, 4), (12, 4, 3), (12, 4, 3, 2), (12, 4, 3, 2, 2)]
SETTINGS = [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 1e-2, "momentum": 0.3}]
GHOST, SEQ = {"groups": 3}, {"groups": 3, "channel_groups": 2}
OPTIONS = {
    **{"group": {"channel_groups": 2}, "ghost": GHOST, "seq": SEQ},
    **{"seq-reversed": SEQ, "ghost-ws": GHOST, "seq-ws": SEQ, "ghost-mean": GHOST, "batch-group": SEQ},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomized(norm):
    """Return the module in float64, with random scale and shift."""
    for parameter in norm.double().parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def stepped(norm, shape):
    """Return outputs and gradients of 3 training steps, and the output of evaluation."""
    results = []
    for x in torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        x.mul_(2).add_(1).requires_grad_()
        y = norm.train()(x)
        results += [y, *torch.autograd.grad(y.pow(3).sum(), [x, *norm.parameters()])]
    return [*results, norm.eval()(torch.linspace(-2, 3, 7 * prod(shape[1:]), dtype=torch.float64).view(7, *shape[1:]))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ghost_norm_one_group(shape, settings):
    native = randomized(NATIVE[len(shape)](4, **settings))
    ghost = GhostNorm(4, 1, **settings).double()
    ghost.load_state_dict(native.state_dict())
    torch.testing.assert_close(stepped(ghost, shape), stepped(native, shape))
    torch.testing.assert_close(ghost.state_dict(), native.state_dict())
    native.load_state_dict(ghost.state_dict())


@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_ghost_norm_running_statistics(groups, layout):
    norm, x = GhostNorm(4, groups, layout=layout, momentum=0.25).double(), torch.randn(12, 4, 3, dtype=torch.float64)
    norm(x)
    members = [x[g::groups] for g in range(groups)] if layout == "interleaved" else x.tensor_split(groups)
    mean = torch.stack([group.mean((0, 2)) for group in members]).mean(0)
    var = torch.stack([group.var((0, 2)) for group in members]).mean(0)
    torch.testing.assert_close(norm.running_mean, 0.25 * mean)
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * var)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["ghost", "seq"])
def test_evaluation_one_sample(name):
    norm = make_norm(name, groups=3)(4)
    norm(torch.randn(12, 4))
    before = copy.deepcopy(norm.eval().state_dict())
    assert norm(torch.randn(1, 4)).shape == (1, 4)
    torch.testing.assert_close(norm.state_dict(), before)


def test_ghost_norm_frozen_statistics():
    norm = GhostNorm(4, 3)
    norm.track_running_stats = False
    norm(torch.randn(12, 4))
    torch.testing.assert_close(norm.running_mean, torch.zeros(4))


@pytest.mark.parametrize(("samples", "groups"), [(16, 4), (19, 4), (5, 1), (2, 1)])
def test_ghost_norm_group_size(samples, groups):
    x = torch.randn(samples, 4, 3)
    torch.testing.assert_close(GhostNorm(4, group_size=4)(x), ghost_norm(x, groups))


@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_seq_norm_layer(layout):
    norm, x = randomized(SeqNorm(4, 3, 2, layout=layout, eps=1e-3)), torch.randn(12, 4, 5, dtype=torch.float64)
    expected = seq_norm(x, 3, 2, norm.weight, norm.bias, layout=layout, eps=1e-3)
    torch.testing.assert_close(norm(x), expected)
    assert norm.state_dict().keys() == nn.BatchNorm1d(4).state_dict().keys()


def test_registry_names_and_options():
    assert set(REGISTRY) == set(NORMS)
    assert all(set(options_of(name)) <= set(options) for name, (_, options) in REGISTRY.items())


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("shape", SHAPES)
def test_make_norm_input_shapes(name, shape):
    norm, x = make_norm(name, **OPTIONS.get(name, {}))(4), torch.randn(shape)
    if name == "instance" and len(shape) == 2:
        with pytest.raises(LandscapeError, match=r"=4 .*single value.*instance norm"):
            norm(x)
        return
    assert norm(x).shape == x.shape
    assert norm.eval()(x).shape == x.shape


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("none", {}, lambda x: x),
        ("batch", {}, nn.BatchNorm2d(4)),
        ("layer", {}, nn.LayerNorm([4, 3, 2])),
        ("instance", {}, nn.InstanceNorm2d(4)),
        ("group", {"channel_groups": 2}, nn.GroupNorm(2, 4)),
        ("ghost", {"groups": 3, "layout": "interleaved"}, lambda x: ghost_norm(x, 3, layout="interleaved")),
        ("seq", {"groups": 3, "channel_groups": 2}, lambda x: seq_norm(x, 3, 2)),
        ("seq-reversed", {"groups": 3, "channel_groups": 2}, lambda x: group_norm(ghost_norm(x, 3), 2)),
        ("ghost-ws", {"groups": 3}, lambda x: ghost_norm(x, 3)),
        ("seq-ws", {"groups": 3, "channel_groups": 2}, lambda x: seq_norm(x, 3, 2)),
        ("ghost-mean", {"groups": 3}, lambda x: ghost_mean_norm(x, 3)[0]),
        ("batch-group", {"groups": 3, "channel_groups": 2}, lambda x: batch_group_norm(x, 3, 2)[0]),
    ],
)
def test_make_norm_functions(name, options, expected):
    x = torch.randn(12, 4, 3, 2)
    factory = pickle.loads(pickle.dumps(make_norm(name, groups=options.pop("groups", None), **options)))
    torch.testing.assert_close(factory(4)(x), expected(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_norm("gost"), "'gost'.*none, batch, ghost, seq, group, layer, instance"),
        (lambda: make_norm("batch", groups=4), "groups=4: .*'batch' takes eps, affine, momentum"),
        (lambda: make_norm("none", eps=1), "eps=1: .*'none' takes no options"),
        (lambda: make_norm("ghost")(4), "groups=None, group_size=None"),
        (lambda: GhostNorm(4, 2, group_size=2), "groups=2, group_size=2: .*exactly one"),
        (lambda: GhostNorm(4, 0), "groups=0.*at least 1"),
        (lambda: make_norm("group", channel_groups=3)(4), "channel_groups=3 .*4 channels"),
        (lambda: make_norm("group")(4), "channel_groups=None .*4 channels"),
        (lambda: SeqNorm(4, 2, 3), "channel_groups=3 .*4 channels"),
        (lambda: GhostNorm(4, 2)(torch.randn(8, 5)), r"shape \(8, 5\): GhostNorm\(4\)"),
        (lambda: BatchNorm(4)(torch.randn(4)), r"shape \(4,\): BatchNorm\(4\)"),
        (lambda: convert_norms(nn.LazyBatchNorm1d(), BatchNorm), "LazyBatchNorm1d.*[Rr]un one batch"),
    ],
)
def test_norm_mistakes(make, message):
    with pytest.raises(LandscapeError, match=message):
        make()


def test_norm_repr():
    assert repr(GhostNorm(64, 16)) == "GhostNorm(64, groups=16)"
    norm = SeqNorm(4, None, 2, group_size=8, momentum=None, layout="interleaved")
    assert repr(norm) == "SeqNorm(4, group_size=8, momentum=None, layout=interleaved, channel_groups=2)"
    assert repr(make_norm("batch")(4)).startswith("BatchNorm(4, ")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_convert_norms_same_outputs(settings):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **settings), nn.ReLU()).double()
    model(torch.randn(12, 3, 2, 2, dtype=torch.float64))
    twin = convert_norms(copy.deepcopy(model), make_norm("ghost", groups=1))
    assert isinstance(twin.get_submodule("1"), GhostNorm)
    torch.testing.assert_close(stepped(twin, (12, 3, 2, 2)), stepped(model, (12, 3, 2, 2)))
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


def test_convert_norms_attributes():
    old = nn.BatchNorm1d(4, eps=1e-3, momentum=0.2).half().eval()
    old.weight.requires_grad_(False)
    new = convert_norms(old, make_norm("ghost", groups=2))
    assert isinstance(new, GhostNorm)
    assert new.weight is old.weight
    assert new.running_var is old.running_var
    assert (new.eps, new.momentum, new.training, new.groups) == (1e-3, 0.2, False, 2)
    group = convert_norms(old, make_norm("group", channel_groups=2))
    assert isinstance(group, GroupNorm)
    assert (group.weight is old.weight, group.eps) == (True, 1e-3)
    nested = convert_norms(nn.BatchNorm1d(4).double(), lambda channels: nn.Sequential(nn.GroupNorm(2, channels)))
    assert nested(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    instance = convert_norms(nn.BatchNorm1d(4).double(), nn.InstanceNorm1d).eval()
    assert instance(torch.randn(2, 4, 3)).shape == (2, 4, 3)


@pytest.mark.parametrize("old", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_convert_norms_sharing(old):
    shared = old(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.Identity()), "b": shared, "c": nn.GroupNorm(2, 4)})
    assert convert_norms(model, make_norm("ghost", groups=2)) is model
    assert isinstance(model["b"], GhostNorm)
    assert model.get_submodule("a.0") is model["b"]
    assert isinstance(model["c"], nn.GroupNorm)
    ghosts = list(model.modules())
    convert_norms(model, make_norm("none"))
    assert list(model.modules()) == ghosts


def test_ghost_norm_update_bn():
    norm, x = GhostNorm(4, 2), torch.randn(8, 4)
    torch.optim.swa_utils.update_bn([x, x], norm)
    torch.testing.assert_close(norm.running_mean, x.mean(0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
def test_ghost_norm_compile():
    norm, x = GhostNorm(4, 2), torch.randn(8, 4, 3, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), ghost_norm(x, 2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.pow(3).sum(), x) for out in (y, expected)))
    assert norm.num_batches_tracked == 1


def test_conversion_by_name():
    model = convert_norms(nn.Sequential(nn.BatchNorm1d(8)), "ghost", groups=4)
    assert repr(model[0]) == "GhostNorm(8, groups=4)"
    for mistake in (lambda: convert_norms(model, 3), lambda: convert_norms(model, BatchNorm, groups=4)):
        with pytest.raises(LandscapeError, match="name of a norm"):
            mistake()
