from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from rays import ENGINES, STEP_SIZES, moved_losses
from torch import nn
from torch.func import functional_call, grad, vmap

from landscape import LandscapeError, ray_losses
from landscape.norms.functional import batch_group_norm, ghost_mean_norm, ghost_norm, group_norm
from landscape.norms.layers import ReversedSeqNorm
from landscape.norms.registry import make_norm
from landscape.training.models import SimpleNet

LAYOUTS = ["contiguous", "interleaved"]
SHAPES = [(16, 6), (16, 6, 3), (16, 6, 2, 3), (16, 6, 2, 3, 2)]
OPTIONS = {
    "seq-reversed": {"channel_groups": 3},
    "ghost-mean": {},
    "batch-group": {"channel_groups": 3},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).mul_(2).add_(3).requires_grad_()


def members_of(samples, groups, layout):
    order = torch.arange(samples)
    return order.tensor_split(groups) if layout == "contiguous" else [order[g::groups] for g in range(groups)]


def by_slices(x, members, channel_groups, eps, whole_variance=False):
    """Return output, means and unbiased variances by channel, slice by slice: slow and obvious."""
    y = torch.zeros_like(x)
    means, variances = torch.zeros(2, len(members), x.shape[1], dtype=x.dtype)
    for g, group in enumerate(members):
        for channels in torch.arange(x.shape[1]).chunk(channel_groups):
            part, spread = x[group][:, channels], x[:, channels] if whole_variance else x[group][:, channels]
            std = (spread.var(correction=0) + eps).sqrt()
            y[group[:, None], channels] = (part - part.mean()) / std
            means[g, channels], variances[g, channels] = part.mean().detach(), part.var().detach()
    return y, means, variances


def slow(name, x, groups, weight, bias, layout="contiguous", eps=1e-5):
    """Return output, means and unbiased variances of a norm in training."""
    members, channels = members_of(len(x), groups, layout), x.shape[1]
    if name == "ghost-mean":
        y, _, _ = by_slices(x, members, channels, eps, whole_variance=True)
        _, *statistics = by_slices(x, members_of(len(x), 1, layout), channels, eps)
    elif name == "batch-group":
        y, *statistics = by_slices(x, members, 3, eps)
    else:
        y, *statistics = by_slices(x, members, channels, eps)
        y, _, _ = by_slices(y, members_of(len(x), len(x), layout), 3, eps)
    shape = (-1, *[1] * (x.dim() - 2))
    return y * weight.view(shape) + bias.view(shape), *statistics


def make_random(name, channels=6, **options):
    """Return the layer in float64, with random scale and shift."""
    norm = make_norm(name, **OPTIONS[name], **options)(channels).double()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    return norm


def gradients(y, *inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 4, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_twin(name, shape, groups, layout):
    norm, x = make_random(name, groups=groups, layout=layout, eps=1e-2, momentum=0.25), normal(*shape)
    inputs = x, norm.weight, norm.bias
    expected, mean, var = slow(name, x, groups, norm.weight, norm.bias, layout, 1e-2)
    y = norm(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, *inputs), gradients(expected, *inputs))
    torch.testing.assert_close(norm.running_mean, 0.25 * mean.mean(0))
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * var.mean(0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_evaluation(name, shape):
    norm, x = make_random(name, groups=3, momentum=None), normal(*shape)
    for _ in range(2):
        norm(normal(*shape))
    assert norm.num_batches_tracked == 2
    normalized = F.batch_norm(x, norm.running_mean, norm.running_var)
    after = (
        partial(F.group_norm, num_groups=3)
        if name == "seq-reversed"
        else lambda x, weight, bias: x * weight.view(-1, *[1] * (x.dim() - 2)) + bias.view(-1, *[1] * (x.dim() - 2))
    )
    torch.testing.assert_close(norm.eval()(x), after(normalized, weight=norm.weight, bias=norm.bias))
    assert norm(x[:1]).shape == (1, *shape[1:])
    assert norm.num_batches_tracked == 2
    assert norm.state_dict().keys() == nn.BatchNorm1d(6).state_dict().keys()


@pytest.mark.parametrize("settings", [{"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_settings(name, settings):
    norm, x = make_random(name, groups=3, **settings), normal(12, 6, 2)
    ones, zeros = torch.ones(6).double(), torch.zeros(6).double()
    weight, bias = (norm.weight, norm.bias) if norm.affine else (ones, zeros)
    torch.testing.assert_close(norm(x), slow(name, x, 3, weight, bias)[0])
    if not norm.track_running_stats:
        torch.testing.assert_close(norm.eval()(x), norm.train()(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_group_norm_limits(layout):
    x, weight, bias = normal(12, 6, 2), normal(6), normal(6)
    ghost, _, _ = batch_group_norm(x, 5, 6, weight, bias, layout=layout)
    torch.testing.assert_close(ghost, ghost_norm(x, 5, weight, bias, layout=layout))
    group, _, _ = batch_group_norm(x, 12, 3, weight, bias, layout=layout)
    torch.testing.assert_close(group, group_norm(x, 3, weight, bias))


def test_ghost_mean_norm_one_group():
    x, weight, bias = normal(12, 6, 2), normal(6), normal(6)
    y, mean, var = ghost_mean_norm(x, 1, weight, bias)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, weight, bias, training=True))
    torch.testing.assert_close(mean, x.detach().mean((0, 2))[None])
    torch.testing.assert_close(var, x.detach().var((0, 2))[None])


def test_reversed_seq_norm_differs():
    x = normal(12, 6, 2)
    forth, back = make_norm("seq", groups=3, channel_groups=3)(6), ReversedSeqNorm(6, 3, 3)
    assert (forth(x.float()) - back(x.float())).abs().max() > 0.1
    groups = back(x.float()).unflatten(1, (3, 2))
    torch.testing.assert_close(groups.mean((2, 3)), torch.zeros(12, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("samples", "groups"), [(8, 2), (7, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_derivatives(name, layout, samples, groups):
    norm = make_random(name, groups=groups, layout=layout, track_running_stats=False)

    def function(x, weight, bias):
        return functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    inputs = normal(samples, 6), normal(6), normal(6)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_transforms(name, groups):
    norm, x, weights = make_random(name, groups=groups, track_running_stats=False), normal(12, 6, 2), normal(4, 6)

    def loss(weight, x):
        return functional_call(norm, {"weight": weight}, (x,)).pow(3).sum()

    def twin(weight, x):
        return slow(name, x, groups, weight, norm.bias)[0].pow(3).sum()

    batched = vmap(grad(loss, argnums=(0, 1)), in_dims=(0, None))(weights.detach(), x.detach())
    single = torch.autograd.grad(twin(weights[2], x), (weights, x))
    torch.testing.assert_close(batched[0][2], single[0][2])
    torch.testing.assert_close(batched[1][2], single[1])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_memory_formats(name, layout, groups, memory_format):
    norm, x = make_random(name, groups=groups, layout=layout), normal(12, 6, 3, 5)
    x = x.detach().to(memory_format=memory_format).requires_grad_()
    expected, _, _ = slow(name, x, groups, norm.weight, norm.bias, layout)
    y = norm(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, x), gradients(expected, x))
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_parameters", [True, False])
@pytest.mark.parametrize("name", ["ghost-mean", "batch-group"])
def test_variants_half_precision(name, low_parameters, dtype):
    norm = make_random(name, groups=3).to(dtype if low_parameters else torch.float32)
    x = normal(12, 6, 3, dtype=torch.float32).detach().to(dtype).requires_grad_()
    y, (expected, _, _) = norm(x), slow(name, x.double(), 3, norm.weight.double(), norm.bias.double())
    torch.testing.assert_close(y, expected.to(dtype))
    assert [gradient.dtype for gradient in gradients(y, x, norm.weight)] == [dtype, norm.weight.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reversed_seq_norm_half_precision(dtype):
    norm, x = make_random("seq-reversed", groups=3).to(dtype), normal(12, 6, 3, dtype=torch.float32).detach().to(dtype)
    between = ghost_norm(x, 3)
    torch.testing.assert_close(norm(x), F.group_norm(between, 3, norm.weight, norm.bias), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_compile(name):
    norm, x = make_random(name, groups=3), normal(12, 6, 2)
    y = torch.compile(norm, fullgraph=True, backend="aot_eager")(x)
    expected, _, _ = slow(name, x, 3, norm.weight, norm.bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, x), gradients(expected, x))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_ray_losses(name, engine):
    options = dict.fromkeys(OPTIONS[name], 4)
    model = SimpleNet(6, 3, make_norm(name, groups=5, **options)).double()
    x, targets = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 3
    case = Case(model, lambda model: F.cross_entropy(model(x), targets))
    expected = moved_losses(case, case.direction(), STEP_SIZES)
    losses = ray_losses(case.model, case.closure, case.direction(), STEP_SIZES, engine=engine)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_variants_mistakes(name, layout):
    with pytest.raises(LandscapeError, match=r"groups=9 .*8 samples.*1 to 8"):
        make_random(name, groups=9, layout=layout)(normal(8, 6))
    with pytest.raises(LandscapeError, match=r"shape \(8, 5\)"):
        make_random(name, groups=2, layout=layout)(normal(8, 5))
    if name != "batch-group":  # Its slices of one sample have several channels.
        with pytest.raises(LandscapeError, match="single value"):
            make_random(name, groups=8, layout=layout)(normal(8, 6))


def test_variants_channel_groups():
    with pytest.raises(LandscapeError, match=r"channel_groups=4 .*6 channels"):
        batch_group_norm(normal(8, 6), 2, 4)
    with pytest.raises(LandscapeError, match="single value"):
        batch_group_norm(normal(8, 6), 8, 6)
    for name in ("batch-group", "seq-reversed"):
        with pytest.raises(LandscapeError, match=r"channel_groups=4 .*6 channels"):
            make_norm(name, groups=2, channel_groups=4)(6)
