"""Weight standardization of the layers before a norm, for the norms that request it."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from landscape.errors import LandscapeError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers in which each row of the weight computes one output channel."""


class WeightStandardization(nn.Module):
    """Parametrization that standardizes the weights of each output channel.

    (w - mu) / sqrt(sigma2 + eps), with the mean and biased variance of that channel's weights. Half precision is
    computed in float32.

    Source: Qiao et al. 2019 (arXiv:1903.10520), section 3.
    """

    eps = 1e-5

    def forward(self, weight: Tensor) -> Tensor:
        """Return the standardized weight, with its shape and dtype."""
        return F.layer_norm(weight, weight.shape[1:], eps=self.eps)


def standardize_weights(model: nn.Module) -> nn.Module:
    """Standardize the weights of layers before norms that request it.

    For the weights w of each output channel::

        w_standardized = (w - mean(w)) / sqrt(var(w) + 1e-5)

    A norm requests it by an attribute ``standardizes_weights = True``, as ``make_norm("ghost-ws", groups=4)(64)`` has.
    The convolutions and linear layers registered before the last such norm are standardized: in most networks all but
    the output layer. A model without such norms is unchanged. `convert_norms` and the models of this package call this
    function; call it at the end of ``__init__`` of a model of your own.

    Parameters stay the same objects, so that an optimizer stays valid, but ``torch.nn.utils.parametrize`` renames them:
    ``conv.weight`` becomes ``conv.parametrizations.weight.original``, also in the ``state_dict``. Save such a model by
    its ``state_dict``, because torch cannot pickle it whole.

    Source: Qiao et al. 2019 (arXiv:1903.10520), section 3.

    Args:
        model: Any module; changed in place. Layers that are standardized already, transposed convolutions and layers
            with a single weight per output channel, which would become 0, are left unchanged.

    Returns:
        ``model``.

    Raises:
        LandscapeError: A lazy layer has no weights yet.

    Examples:
        >>> from landscape import make_norm
        >>> model = nn.Sequential(nn.Linear(6, 8), make_norm("ghost-ws", groups=4)(8), nn.Linear(8, 3))
        >>> [name for name, _ in standardize_weights(model)[0].named_parameters()]
        ['bias', 'parametrizations.weight.original']
        >>> bool(model[0].weight.mean(1).abs().max() < 1e-6)
        True
    """
    modules = list(model.modules())
    norms = [index for index, module in enumerate(modules) if getattr(module, "standardizes_weights", False)]
    for layer in modules[: norms[-1]] if norms else ():
        if isinstance(layer, LAYERS) and not any(isinstance(part, WeightStandardization) for part in layer.modules()):
            _standardize(layer)
    return model


def _standardize(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    if isinstance(layer, LazyModuleMixin):
        raise LandscapeError(f"{layer}: has no weights to standardize yet. Run one batch through the model before.")
    if layer.weight[0].numel() > 1:
        parametrize.register_parametrization(layer, "weight", WeightStandardization())
