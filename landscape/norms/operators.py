"""Ghost normalization as an operator of torch: one call, however it is computed."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from landscape.errors import LandscapeError
from landscape.norms import kernel
from landscape.norms.slices import at_least_float32, split_uneven_groups, with_strides_of
from landscape.norms.standardize import (
    Output,
    backward,
    backward_in_place,
    backward_native,
    forward,
    forward_in_place,
    forward_native,
)

# What runs inside of an operator:
#
#     batch                                   forward and backward
#     on a CPU, contiguous or channels_last   kernel.cpp, if it is compiled
#     on a CPU                                standardize.forward_in_place, backward_in_place
#     on an accelerator                       standardize.forward_native, backward_native
#
# Under torch.func, forward-mode AD, torch.compile, torch.export and torch.jit.trace, and for derivatives of
# derivatives, there is no operator: standardize.forward and backward are made of differentiable operations.

_LIBRARY = torch.library.Library("landscape", "DEF")
_LIBRARY.define(
    "standardize(Tensor x, Tensor? weight, Tensor? bias, int groups, bool interleaved, float eps) "
    "-> (Tensor y, Tensor mean, Tensor var, Tensor inv_std)"
)
_LIBRARY.define(
    "standardize_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor inv_std, int groups, "
    "bool interleaved, float eps) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
_LIBRARY.define(
    "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, float momentum) "
    "-> ()"
)


def standardize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Standardize each channel in each group of samples.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance of a channel in a group.

    Args:
        x: (M, C) or (M, C, ...), floating-point.
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        groups: G, from 1 to M. If it does not divide M, the first groups have a sample more.
        interleaved: True if sample i is in group i mod G, False if a group is a run of consecutive samples.
        eps: Added to the variance.

    Returns:
        y, with shape, dtype and strides of ``x``; means and unbiased variances, each (G, C), in at least float32.
    """
    if _is_transformed():
        return _by_operations(x, weight, bias, groups, interleaved, eps)[:3]
    return _under_autograd(x, weight, bias, groups, interleaved, eps)[:3]


def update_running_stats(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float) -> None:
    """Move running statistics towards the mean over the groups.

    running = (1 - momentum) * running + momentum * batch, as in batch normalization.

    Args:
        running_mean: (C,), written to.
        running_var: (C,), written to.
        mean: (G, C).
        var: Unbiased variances, (G, C).
        momentum: Weight of the batch.
    """
    update = _update_by_operations if _is_transformed() else torch.ops.landscape.update_running_stats.default
    update(running_mean, running_var, mean, var, momentum)


def _update_by_operations(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> None:
    for running, groups in ((running_mean, mean), (running_var, var)):
        running.mul_(1 - momentum).add_(groups.mean(0), alpha=momentum)


def _update_running_stats(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> None:
    running, batch = (running_mean, running_var), (mean, var)
    if kernel.takes_statistics(running, batch):
        kernel.update_running_stats(running, batch, momentum)
    else:
        _update_by_operations(running_mean, running_var, mean, var, momentum)


def _is_transformed() -> bool:
    # These transform plain operations.
    return (
        torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        or forward_ad._current_level >= 0
    )


def _by_operations(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    def function(x: Tensor, groups: int, interleaved: bool) -> Output:
        return forward(x, weight, bias, groups, interleaved, eps)

    return split_uneven_groups(function, [x], groups, interleaved)  # pyright: ignore[reportReturnType]


def _standardize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    if not 1 <= groups <= len(x):  # The kernel would divide by 0, or read beyond the batch.
        raise LandscapeError(f"groups={groups} on a batch of {len(x)} samples: must be 1 to {len(x)}. Use ghost_norm.")
    if kernel.takes(x, weight, bias):
        return kernel.forward(x, weight, bias, groups, interleaved, eps)

    def function(x: Tensor, groups: int, interleaved: bool) -> Output:
        compute = forward_in_place if x.is_cpu else forward_native
        return compute(x, weight, bias, groups, interleaved, eps)

    y, mean, var, inv_std = split_uneven_groups(function, [x], groups, interleaved)
    return with_strides_of(x, y), mean, var, inv_std


def _standardize_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    groups: int,
    interleaved: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel.takes_backward(dy, x, weight, mean, inv_std, groups):
        return kernel.backward(dy, x, weight, mean, inv_std, groups, interleaved)

    def function(
        dy: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor, groups: int, interleaved: bool
    ) -> tuple[Tensor, ...]:
        if x.is_cpu:
            return backward_in_place(dy, x, weight, mean, inv_std, groups, interleaved)
        return backward_native(dy, x, weight, mean, inv_std, groups, interleaved, eps)

    dx, dweight, dbias = split_uneven_groups(function, [dy, x], groups, interleaved, [mean, inv_std])
    return with_strides_of(x, dx), dweight.sum(0), dbias.sum(0)


class _Standardize(torch.autograd.Function):
    """The operator under autograd.

    As in batch normalization, x is the only large tensor that is saved.
    """

    is_operator = True
    """True as its derivative is that of the call of the operator, wherever that is made again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Output:
        x, weight, _, ctx.groups, ctx.interleaved, ctx.eps = inputs
        with torch.enable_grad():  # as in the code that calls it, which a recorder of calls sees
            y, mean, var, inv_std = _below_autograd(*inputs)
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.mark_non_differentiable(mean, var, inv_std)
        ctx.set_materialize_grads(False)  # Gradients of the statistics are not allocated.
        return y, mean, var, inv_std

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if (dy := gradients[0]) is None:
            return (None,) * 6
        x, weight, mean, inv_std = ctx.saved_tensors
        groups, interleaved, eps = ctx.groups, ctx.interleaved, ctx.eps
        if torch.is_grad_enabled() or _is_transformed():

            def function(dy: Tensor, x: Tensor, groups: int, interleaved: bool) -> tuple[Tensor, ...]:
                return backward(dy, x, weight, groups, interleaved, eps)

            dx, *slices = split_uneven_groups(function, [dy, x], groups, interleaved)
            dweight, dbias = (one.sum(0) for one in slices)
        else:
            dx, dweight, dbias = torch.ops.landscape.standardize_backward.default(
                dy, x, weight, mean, inv_std, groups, interleaved, eps
            )
        _, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        return dx, dweight if needs_dweight else None, dbias if needs_dbias else None, None, None, None


def _under_autograd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, weight, bias)):
        return _Standardize.apply(x, weight, bias, groups, interleaved, eps)
    return _below_autograd(x, weight, bias, groups, interleaved, eps)


def _below_autograd(*inputs: Any) -> Output:
    # Below the tracking of views, too, as a later operation may write to y (ReLU(inplace=True)), which autograd refuses
    # for a view that a Function returns.
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return torch.ops.landscape.standardize.default(*inputs)


def _fake_standardize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, interleaved: bool, eps: float
) -> Output:
    statistic = at_least_float32(x).new_empty(groups, x.shape[1])
    return torch.empty_like(x), statistic, torch.empty_like(statistic), torch.empty_like(statistic)


def _fake_standardize_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])


_LIBRARY.impl("standardize", _standardize, "CompositeExplicitAutograd")
_LIBRARY.impl("standardize_backward", _standardize_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("update_running_stats", _update_running_stats, "CompositeExplicitAutograd")
torch.library.register_fake("landscape::standardize", _fake_standardize, lib=_LIBRARY)
torch.library.register_fake("landscape::standardize_backward", _fake_standardize_backward, lib=_LIBRARY)
torch.library.register_fake("landscape::update_running_stats", lambda *_: None, lib=_LIBRARY)
_LIBRARY.impl("standardize", _under_autograd, "Autograd")
