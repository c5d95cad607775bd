import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, vmap

from landscape.errors import LandscapeError
from landscape.norms import functional
from landscape.norms.functional import ghost_norm, ghost_norm_with_statistics, seq_norm
from landscape.norms.layers import GhostNorm
from landscape.norms.slices import slices_of

LAYOUTS = ["contiguous", "interleaved"]
SHAPES = [(24, 5), (24, 5, 3), (24, 5, 2, 3), (24, 5, 2, 3, 2)]
PAPER = torch.tensor([35.0, 39, 30, 4, 38, 26, 27, 19])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype).mul_(2).add_(3).requires_grad_()


def by_chunks(x, groups, weight=None, bias=None, layout="contiguous", eps=1e-5):
    """Return output, means and unbiased variances, with one batch normalization per group: slow and obvious."""
    samples = torch.arange(len(x))
    members = samples.tensor_split(groups) if layout == "contiguous" else [samples[g::groups] for g in range(groups)]
    parts, means, variances = [], [], []
    for group in members:
        mean, var = torch.zeros(2, x.shape[1], dtype=x.dtype)
        parts.append(F.batch_norm(x[group], mean, var, weight, bias, training=True, momentum=1.0, eps=eps))
        means.append(mean)
        variances.append(var)
    return torch.cat(parts)[torch.cat(members).argsort()], torch.stack(means), torch.stack(variances)


def gradients(y, *inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (1, [0.7, 1.1, 0.3, -2.2, 1.0, -0.1, -0.02, -0.8]),
        (2, [0.6, 0.9, 0.2, -1.7, 1.5, -0.2, -0.07, -1.2]),
    ],
)
@pytest.mark.parametrize("shape", [(8, 1), (8, 1, 1)])
def test_ghost_norm_paper_example(groups, expected, shape):
    y = ghost_norm(PAPER.view(shape), groups).flatten()
    rounded = [round(value, 2 if abs(target) < 0.1 else 1) for value, target in zip(y.tolist(), expected, strict=True)]
    assert rounded == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 4, 5, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_twin(shape, groups, layout):
    x, weight, bias = normal(*shape), normal(5), normal(5)
    fast = ghost_norm_with_statistics(x, groups, weight, bias, layout, 1e-3)
    slow = by_chunks(x, groups, weight, bias, layout, 1e-3)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradients(fast[0], x, weight, bias), gradients(slow[0], x, weight, bias))


@pytest.mark.parametrize("groups", [4, 7])
def test_ghost_norm_interleaved_permutation(groups):
    x = normal(24, 5, 3)
    order = torch.arange(24).remainder(groups).argsort(stable=True)
    torch.testing.assert_close(ghost_norm(x, groups, layout="interleaved")[order], ghost_norm(x[order], groups))


@pytest.mark.parametrize(("shape", "groups"), [((9, 2), 3), ((9, 2), 2), ((4, 2, 3), 4), ((7, 2, 2), 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_derivatives(shape, groups, layout):
    inputs = normal(*shape), normal(2), normal(2)

    def norm(x, weight, bias):
        return ghost_norm(x, groups, weight, bias, layout=layout)

    assert torch.autograd.gradcheck(norm, inputs)
    assert torch.autograd.gradgradcheck(norm, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_transforms(layout):
    x, weights, bias = normal(12, 2).detach(), normal(4, 2).detach(), normal(2).detach()

    def loss(x, weight, bias):
        return ghost_norm(x, 3, weight, bias, layout=layout).pow(3).sum()

    def slow(x, weight, bias):
        return by_chunks(x, 3, weight, bias, layout)[0].pow(3).sum()

    for batched in [(None, 0, None), (None, None, 0), (0, None, None)]:
        inputs = [
            torch.stack([tensor + i for i in range(3)]) if dim == 0 else tensor
            for tensor, dim in zip((x, weights[0], bias), batched, strict=True)
        ]
        which = batched.index(0)
        fast = vmap(grad(loss, argnums=which), in_dims=batched)(*inputs)
        for i in range(3):
            point = [tensor[i] if dim == 0 else tensor for tensor, dim in zip(inputs, batched, strict=True)]
            torch.testing.assert_close(fast[i], grad(slow, argnums=which)(*point))
    torch.testing.assert_close(jacrev(grad(loss))(x, weights[0], bias), jacrev(grad(slow))(x, weights[0], bias))


def test_ghost_norm_nested_vmap():
    x, weights = torch.randn(3, 12, 2), torch.randn(4, 2)
    y = vmap(lambda weight: vmap(lambda x: ghost_norm(x, 3, weight))(x))(weights)
    torch.testing.assert_close(y[2, 1], ghost_norm(x[1], 3, weights[2]))


def test_ghost_norm_layer_vmap():
    norm, x = GhostNorm(2, 3), torch.randn(12, 2)
    state = {name: torch.stack([t, t]) for name, t in {**norm.state_dict(), "weight": normal(2)}.items()}
    y = vmap(lambda state: functional_call(norm, state, (x,)))(state)
    torch.testing.assert_close(y[1], ghost_norm(x, 3, state["weight"][1].float()))


def test_seq_norm_composition():
    x, weight, bias = normal(12, 6, 2), normal(6), normal(6)
    expected, _, _ = by_chunks(F.group_norm(x, 3), 4, weight, bias)
    torch.testing.assert_close(seq_norm(x, 4, 3, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_parameters", [True, False])
def test_ghost_norm_half_precision(dtype, low_parameters):
    x = normal(32, 4, 3, dtype=torch.float32).detach().to(dtype).requires_grad_()
    weight = torch.rand(4).to(dtype if low_parameters else torch.float32).requires_grad_()
    y = ghost_norm(x, 4, weight)
    expected = by_chunks(x.float(), 4, weight.float())[0]
    torch.testing.assert_close(y, expected.to(dtype))
    x_gradient, weight_gradient = gradients(y, x, weight)
    assert (x_gradient.dtype, weight_gradient.dtype) == (dtype, weight.dtype)


MEMORY_FORMATS = {
    "plain": lambda x: x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "strided": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("memory", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", [(8, 4, 3, 5), (10, 4, 1, 1), (8, 1, 3, 5), (8, 4, 3, 1), (8, 4, 2, 3, 5)])
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_memory_formats(memory, shape, groups, layout):
    x, weight, bias = (
        MEMORY_FORMATS[memory](normal(*shape).detach()).requires_grad_(),
        normal(shape[1]),
        normal(shape[1]),
    )
    fast = ghost_norm_with_statistics(x, groups, weight, bias, layout, 1e-3)
    slow = by_chunks(x, groups, weight, bias, layout, 1e-3)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(gradients(fast[0], x, weight, bias), gradients(slow[0], x, weight, bias))
    with torch.no_grad():
        torch.testing.assert_close(ghost_norm_with_statistics(x, groups, weight, bias, layout, 1e-3), slow)


@pytest.mark.parametrize("shape", [(8, 4, 3, 5), (8, 4, 1, 5), (8, 4, 2, 3, 5)])
@pytest.mark.parametrize("memory", ["plain", "channels last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_no_copy(memory, shape, layout):
    x = MEMORY_FORMATS[memory](normal(*shape).detach()).requires_grad_()
    native = F.batch_norm(x, None, None, training=True)
    y = ghost_norm(x, 2, layout=layout)
    (gradient,) = gradients(y, x)
    assert y.stride() == native.stride() == gradient.stride()
    assert slices_of(x, 2, layout == "interleaved").view(x).data_ptr() == x.data_ptr()


def test_seq_norm_channels_last():
    x = normal(8, 4, 3, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    y = seq_norm(x, 2, 2)
    assert y.stride() == gradients(y, x)[0].stride() == x.stride()
    torch.testing.assert_close(y, by_chunks(F.group_norm(x, 2), 2)[0])


def test_ghost_norm_backward_vmap():
    x, directions = normal(8, 3), torch.randn(5, 8, 3, dtype=torch.float64)
    y = ghost_norm(x, 2)
    batched = vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(directions)
    torch.testing.assert_close(batched[3], torch.autograd.grad(y, x, directions[3])[0])


def test_ghost_norm_autocast():
    x = normal(8, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = ghost_norm(x, 2)
    torch.testing.assert_close(y, by_chunks(x.detach(), 2)[0], check_dtype=True)


@pytest.mark.parametrize("shape", [(512, 30), (64, 8, 16, 16)])
@pytest.mark.parametrize("memory", ["plain", "channels last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_large_mean(shape, memory, layout):
    x = MEMORY_FORMATS[memory](torch.randn(shape) + 1e4).requires_grad_()
    y, exact = ghost_norm(x, 4, layout=layout), by_chunks(x.double(), 4, layout=layout)[0]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-2)
    torch.testing.assert_close(*(gradients(out, x)[0] for out in (y, exact)), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("shape", "groups", "message"),
    [
        ((8, 3), 9, "groups=9 .*8 samples.*1 to 8"),
        ((8, 3), 0, "groups=0 .*8 samples"),
        ((8, 3), 5, "groups=5 .*8 samples.*single value"),
        ((8, 3, 1, 1), 8, "single value"),
        ((8,), 2, r"shape \(8,\)"),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_norm_mistakes(shape, groups, message, layout):
    with pytest.raises(LandscapeError, match=message):
        ghost_norm(torch.randn(shape), groups, layout=layout)


def test_ghost_norm_dtype_and_layout():
    with pytest.raises(LandscapeError, match="int64"):
        ghost_norm(PAPER.long().view(8, 1), 2)
    with pytest.raises(LandscapeError, match=r"'random'.*contiguous, interleaved"):
        ghost_norm(PAPER.view(8, 1), 2, layout="random")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("channel_groups", "message"), [(4, "channel_groups=4 .*6 channels"), (0, "=0"), (6, "=6 .*single value")]
)
def test_seq_norm_mistakes(channel_groups, message):
    with pytest.raises(LandscapeError, match=message):
        seq_norm(torch.randn(8, 6), 2, channel_groups)


def test_ghost_norm_two_values():
    functional._warn_of_signs.cache_clear()
    x = torch.randn(8, 3)
    with pytest.warns(UserWarning, match=r"groups=4 .*8 samples.*\+1 and -1"):
        y = ghost_norm(x, 4, eps=0)
    torch.testing.assert_close(y.abs(), torch.ones(8, 3))
    with warnings.catch_warnings(record=True) as again:
        warnings.simplefilter("always")
        ghost_norm(x, 4)
    assert not again
