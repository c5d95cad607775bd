"""Weight standardization of the layers before a norm, for the norms that ask for it."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from landscape.errors import LandscapeError

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The layers with an output channel for each row of the weight."""


class WeightStandardization(nn.Module):
    """A parametrization: (w - mean) / sqrt(var + eps), with mean and biased variance of each output channel's weights.

    Qiao et al. 2019 (arXiv:1903.10520), section 3, on weights (C, ...) of C output channels. Half precision is computed
    in float32.
    """

    eps = 1e-5

    def forward(self, weight: Tensor) -> Tensor:
        """Shape and dtype of ``weight``."""
        return F.layer_norm(weight, weight.shape[1:], eps=self.eps)


def standardize_weights(model: nn.Module) -> nn.Module:
    """Standardize the weights that feed the norms which ask for it, such as ``make_norm("ghost-ws", groups=4)(64)``.

    A norm asks by an attribute ``standardizes_weights``. What feeds it is taken to be the convolutions and linear
    layers that are registered before the last such norm: in most networks all but the output layer. A model without
    such norms stays as it is. `landscape.convert_norms` and the models of this package call this function; a model of
    your own does so at the end of its ``__init__``.

    The parameters are the same objects, so an optimizer stays valid, but ``torch.nn.utils.parametrize`` renames them:
    ``conv.weight`` becomes ``conv.parametrizations.weight.original``, in the ``state_dict`` too. Such a model is saved
    by its ``state_dict``: torch does not pickle it whole.

    Args:
        model: Any module; it is changed in place. Layers that are standardized stay so, once. Transposed convolutions,
            and layers with a single weight for each output channel, which would become 0, are left alone.

    Returns:
        ``model``.

    Raises:
        LandscapeError: A lazy layer does not yet have its weights.
    """
    modules = list(model.modules())
    asking = [place for place, module in enumerate(modules) if getattr(module, "standardizes_weights", False)]
    for layer in modules[: asking[-1]] if asking else ():
        if isinstance(layer, LAYERS) and not any(isinstance(part, WeightStandardization) for part in layer.modules()):
            _standardize(layer)
    return model


def _standardize(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    if isinstance(layer, LazyModuleMixin):
        raise LandscapeError(f"{layer} has no weights yet to standardize. Run one batch through the model before.")
    if layer.weight[0].numel() > 1:
        parametrize.register_parametrization(layer, "weight", WeightStandardization())
