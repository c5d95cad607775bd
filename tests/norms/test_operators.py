"""The operator of ghost normalization: each way to compute it equals the formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

from landscape import GhostNorm, LandscapeError, ghost_norm, seq_norm
from landscape.norms import kernel
from landscape.norms.functional import batch_group_norm, ghost_mean_norm
from landscape.norms.operators import standardize, update_running_stats
from landscape.norms.slices import split_uneven_groups, with_strides_of
from landscape.norms.standardize import (
    backward,
    backward_in_place,
    backward_native,
    forward,
    forward_in_place,
    forward_native,
)

needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="the kernel was not compiled at installation")
SHAPES = [(9, 5), (64, 1), (40, 32), (33, 71), (8, 16, 3, 5), (6, 33, 4), (7, 8, 2, 3, 2), (12, 4, 1, 1), (9, 3, 70, 2)]
EPS = 1e-3


def channels_last(x):
    """Return a copy with channels innermost in memory."""
    return x.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


LAYOUTS = [channels_last, torch.Tensor.contiguous]


def batch(shape, dtype=torch.float64, scale=2.0, layout=channels_last):
    torch.manual_seed(0)
    x, dy = (layout(scale * torch.randn(shape, dtype=dtype) + 1) for _ in range(2))
    return x, dy, *torch.randn(2, shape[1], dtype=dtype)


def by_formula(x, dy, weight, bias, groups, interleaved):
    """Return the outputs of both passes by differentiable operations."""

    def there(x, groups, interleaved):
        return forward(x, weight, bias, groups, interleaved, EPS)

    def back(dy, x, groups, interleaved):
        return backward(dy, x, weight, groups, interleaved, EPS)

    found = split_uneven_groups(there, [x], groups, interleaved)
    return found, split_uneven_groups(back, [dy, x], groups, interleaved)


def summed(back):
    """Return the outputs of a backward pass with the gradients of parameters added over the groups."""
    dx, *slices = back
    return dx, *(one.sum(0) for one in slices)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_equals_the_formula(shape, groups, interleaved, affine, layout):
    x, dy, *parameters = batch(shape, layout=layout)
    weight, bias = parameters if affine else (None, None)
    assert kernel.takes(x, weight, bias)
    found = kernel.forward(x, weight, bias, groups, interleaved, EPS)
    expected, expected_back = by_formula(x, dy, weight, bias, groups, interleaved)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    _, mean, _, inv_std = found
    back = kernel.backward(dy, x, weight, mean, inv_std, groups, interleaved)
    torch.testing.assert_close(back, summed(expected_back), rtol=1e-11, atol=1e-11)


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_kernel_has_the_same_bits_with_any_threads(threads):
    x, _, weight, bias = batch((64, 71), torch.float32)
    expected = kernel.forward(x, weight, bias, 4, False, EPS)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = kernel.forward(x, weight, bias, 4, False, EPS)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("shape", [(100_000, 40), (64, 16, 40, 40)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_adds_many_values_without_losing_digits(shape, layout):
    x, dy, weight, bias = batch(shape, torch.float32, layout=layout)
    found = kernel.forward(x, weight, bias, 2, False, EPS)
    doubled = [one.double() for one in (x, dy, weight, bias)]
    expected, expected_back = by_formula(*doubled, 2, False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)
    _, mean, _, inv_std = found
    dx, *sums = kernel.backward(dy, x, weight, mean, inv_std, 2, False)
    torch.testing.assert_close(dx.double(), expected_back[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(sums, summed(expected_back)[1:], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@needs_kernel
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_kernel_keeps_what_is_not_finite(value):
    x, dy, weight, bias = batch((12, 40), torch.float32)
    x[2, 33] = value
    found = kernel.forward(x, weight, bias, 3, False, EPS)
    expected, _ = by_formula(x, dy, weight, bias, 3, False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert found[0][:4, 33].isnan().all()
    assert found[0].isfinite().sum() == x.numel() - 4


@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
@pytest.mark.parametrize(("shape", "groups"), [(s, g) for s in SHAPES for g in (1, 3, 4) if s[0] % g == 0])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("way", ["in place", "native"])
def test_other_ways_equal_the_formula(way, shape, groups, interleaved, memory):
    x, dy, weight, bias = batch(shape)
    x = x if memory == "channels last" else x.contiguous()
    ways = {"in place": (forward_in_place, backward_in_place, ()), "native": (forward_native, backward_native, (EPS,))}
    there, back, more = ways[way]
    found = there(x, weight, bias, groups, interleaved, EPS)
    expected, expected_back = by_formula(x, dy, weight, bias, groups, interleaved)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert with_strides_of(x, found[0]).stride() == torch.empty_like(x).stride()
    backs = back(dy, x, weight, found[1], found[3], groups, interleaved, *more)
    torch.testing.assert_close(backs, expected_back, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernel), False])
@pytest.mark.parametrize("groups", [4, 5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_operator_is_well_behaved(compiled, groups, interleaved, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernel, "library", lambda: None)
    x, _, weight, bias = (one.requires_grad_() for one in batch((12, 5)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.landscape.standardize.default, (x, weight, bias, groups, interleaved, EPS), test_utils=checks)
    assert torch.autograd.gradcheck(
        lambda *inputs: standardize(*inputs, groups, interleaved, EPS)[0], (x, weight, bias)
    )
    assert torch.autograd.gradgradcheck(
        lambda *inputs: standardize(*inputs, groups, interleaved, EPS)[0], (x, weight, bias)
    )


@pytest.mark.parametrize("shape", [(11, 5), (12, 5, 3, 2)])
@pytest.mark.parametrize("memory", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_later_operations_may_write_to_the_output(shape, memory, groups, layout):
    x, dy, weight, bias = batch(shape)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    x = {"contiguous": x.contiguous(), "channels last": x, "transposed": transposed}[memory]
    inputs = [one.requires_grad_() for one in (x, weight, bias)]
    gradients = []
    for relu in (torch.relu, torch.relu_):
        y = ghost_norm(inputs[0], groups, *inputs[1:], layout=layout)
        gradients.append(torch.autograd.grad(relu(y), inputs, dy))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    strides = torch.empty_like(x).stride()
    assert (y.stride(), gradients[0][0].stride()) == (strides, strides)


def by_parts(x, groups, weight, bias):
    """Normalize with one call of torch's batch normalization per group."""
    parts = x.chunk(groups)
    return torch.cat([F.batch_norm(part, None, None, weight, bias, training=True) for part in parts])


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # by torch's derivatives themselves
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("backward_too", [True, False])
def test_forward_mode_derivatives(which, backward_too):
    x, tangent, weight, bias = batch((12, 5))
    tangent = tangent if which == 0 else tangent[0]
    found = []
    for function in (ghost_norm, by_parts):
        with forward_ad.dual_level():
            inputs = [one.detach().requires_grad_(backward_too) for one in (x, weight, bias)]
            inputs[which] = forward_ad.make_dual(inputs[which], tangent)
            found.append(forward_ad.unpack_dual(function(inputs[0], 3, *inputs[1:])).tangent)
    torch.testing.assert_close(*found)


WRONG = [torch.ones(3), torch.ones(1), torch.ones(10), torch.ones(5, 1), torch.ones(5, device="meta")]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("which", ["weight", "bias"])
def test_parameters_of_another_form_are_refused(wrong, which):
    x, *_ = batch((12, 5), torch.float32)
    for function in (ghost_norm, lambda x, groups, **given: seq_norm(x, groups, 1, **given), ghost_mean_norm):
        with pytest.raises(LandscapeError, match=r"\(5,\) on cpu"):
            function(x, 3, **{which: wrong})
    with pytest.raises(LandscapeError, match=r"\(5,\) on cpu"):
        batch_group_norm(x, 3, 1, **{which: wrong})


@pytest.mark.parametrize("groups", [0, -1, 13])
def test_operator_refuses_other_numbers_of_groups(groups):
    x, *_ = batch((12, 5), torch.float32)
    with pytest.raises(LandscapeError, match=f"groups={groups} .*1 to 12"):
        torch.ops.landscape.standardize(x, None, None, groups, False, EPS)


def test_kernel_gets_no_tensors_of_another_form():
    x, dy, weight, _ = batch((12, 5), torch.float32)
    assert not kernel.takes(x, weight[:3])
    assert not kernel.takes(x, weight.to("meta"))
    assert not kernel.takes(x[:, ::2], None)
    assert not kernel.takes_backward(dy, x, weight, torch.ones(1, 5), torch.ones(3, 5), 3)
    assert not kernel.takes_backward(dy[:3], x, weight, torch.ones(3, 5), torch.ones(3, 5), 3)
    assert not kernel.takes_statistics((torch.zeros(3), torch.zeros(3)), (torch.ones(3, 5), torch.ones(3, 5)))
    norm = GhostNorm(5, 3)
    norm.running_mean = torch.zeros(3)
    with pytest.raises(RuntimeError, match="must match the size"):
        norm(x)


def awkward(name, x):
    """Return the values of a batch in an unusual tensor."""
    if name == "negated view":
        return torch._neg_view(-x)
    if name == "overlapping":
        return x.flatten().as_strided(x.shape, (2, 1))
    if name == "expanded":
        return x[:1].expand(x.shape)
    return x.as_subclass(Subclass) if name == "subclass" else x.t().contiguous().t()


class Subclass(torch.Tensor):
    """A tensor of a library."""


@pytest.mark.parametrize("name", ["negated view", "overlapping", "expanded", "subclass", "transposed"])
def test_unusual_tensors(name):
    x, dy, weight, bias = batch((12, 5))
    found = []
    for given in (awkward(name, x), awkward(name, x).as_subclass(torch.Tensor).resolve_neg().contiguous()):
        inputs = given.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
        y = ghost_norm(inputs[0], 3, *inputs[1:])
        assert type(y) is type(given)
        found.append([one.as_subclass(torch.Tensor) for one in (y, *torch.autograd.grad(y, inputs, dy))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)])
def test_gradients_of_some_inputs(which):
    x, dy, weight, bias = batch((12, 5))
    inputs = [one.clone().requires_grad_(k in which) for k, one in enumerate((x, weight, bias))]
    asked = [inputs[k] for k in which]
    expected = torch.autograd.grad(by_parts(inputs[0], 3, *inputs[1:]), asked, dy)
    torch.testing.assert_close(torch.autograd.grad(ghost_norm(inputs[0], 3, *inputs[1:]), asked, dy), expected)


@pytest.mark.parametrize(
    "pack", [lambda one: one.mT.contiguous().mT if one.dim() > 1 else one, lambda one: one.double().float()]
)
def test_saved_tensors_may_come_back_in_another_form(pack):
    x, dy, weight, bias = (one.requires_grad_() for one in batch((12, 5), torch.float32))
    expected = torch.autograd.grad(ghost_norm(x, 3, weight, bias), (x, weight, bias), dy)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        y = ghost_norm(x, 3, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(y, (x, weight, bias), dy), expected)


def test_gradient_without_memory():
    x, *_ = batch((12, 5))
    y = ghost_norm(x.requires_grad_(), 3)
    zero = torch._efficientzerotensor(y.shape, dtype=y.dtype)
    torch.testing.assert_close(torch.autograd.grad(y, x, zero)[0], torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(LandscapeError, match=f"{dtype}.*floating-point"):
        ghost_norm(torch.ones(8, 4).to(dtype), 2)


def test_shapes_without_values():
    norm = GhostNorm(5, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(12, 5, 2, requires_grad=True)
        y = norm(x)
        y.sum().backward()
    assert (y.shape, x.grad.shape) == (x.shape, x.shape)
    x = torch.randn(12, 5, device="meta", requires_grad=True)
    norm = norm.to("meta")
    norm(x).sum().backward()
    assert x.grad.device.type == norm.weight.grad.device.type == "meta"


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_of_any_momentum_follow_batch_norm(momentum):
    mine, other = GhostNorm(3, groups=1, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for seed in range(3):
        x, *_ = batch((8, 3), torch.float32, scale=1.0 + seed)
        torch.testing.assert_close(mine(x), other(x))
    torch.testing.assert_close(mine.state_dict(), other.state_dict())


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernel), False])
def test_running_statistics_are_seen_to_change(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(kernel, "library", lambda: None)
    running, batch = torch.rand(2, 5), torch.rand(2, 4, 5)
    expected = 0.7 * running + 0.3 * batch.mean(1)
    mean, var = running.unbind()
    version = mean._version
    update_running_stats(mean, var, *batch, 0.3)
    torch.testing.assert_close(running, expected)
    assert mean._version > version
    arguments = (mean, var, *batch, 0.3)
    opcheck(torch.ops.landscape.update_running_stats.default, arguments, test_utils=("test_schema", "test_faketensor"))
