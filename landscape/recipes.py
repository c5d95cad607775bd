"""What an experiment is: frozen recipes, by name."""

from dataclasses import dataclass, replace
from typing import Self

from landscape.errors import UserError
from landscape.vocabulary import options_of


@dataclass(frozen=True)
class Recipe:
    """One training run, completely; equal recipes give equal traces on the same machine.

    The last, incomplete batch of an epoch is left out, so that every update has ``batch_size`` samples and every ghost
    batch its full share of them.
    """

    recipe: str
    dataset: str
    model: str
    batch_size: int
    epochs: int
    lr: float
    """Learning rate of plain SGD."""
    probe_lrs: tuple[float, ...]
    """Step sizes eta of the probe."""
    norm: str = "batch"
    groups: int | None = 16
    """Groups G_M of the batch, for norms that take them."""
    channel_groups: int | None = 4
    """Groups G_C of the channels, for norms that take them."""
    every: int = 1
    """Every how many updates the probe measures."""
    overhead: float | None = None
    """Share of the training time that probes may cost; measured updates then depend on how fast the machine is."""
    gradients: bool = False
    """Whether the gradient is computed at each step size too."""
    engine: str = "affine"
    """How rays are evaluated; ``auto`` is not repeatable: which engine is fastest may differ between runs."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    @property
    def run(self) -> str:
        """Name of the run, such as ``mnist-ghost16-seed0``."""
        variant = "-".join(str(value) for value in self.norm_options.values())
        return f"{self.recipe}-{self.norm}{variant}-seed{self.seed}"

    @property
    def norm_options(self) -> dict[str, int]:
        """The options that this recipe's norm takes."""
        return {name: getattr(self, name) for name in options_of(self.norm)}

    def checked(self) -> Self:
        """The recipe without options that its norm does not take; a UserError where a value is out of range."""
        options = options_of(self.norm)
        for name in ("batch_size", "epochs", "every", *options):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name}={value} is out of range; give a whole number from 1 on.")
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr={self.lr} is out of range; give a finite learning rate above 0.")
        if self.overhead is not None and not 0 < self.overhead < float("inf"):
            raise UserError(f"overhead={self.overhead} is out of range; give a share of the training time above 0.")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed} is out of range; give a whole number from 0 to 2**63 - 1.")
        unused = {name: None for name in ("groups", "channel_groups") if name not in options}
        return replace(self, **unused)


_PAPER_LRS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)

RECIPES = {
    # Dimitriou & Arandjelovic 2020, section 3.1: SimpleNet on MNIST, figure 4.
    "mnist": Recipe("mnist", "mnist", "simplenet", batch_size=512, epochs=4, lr=0.4, probe_lrs=_PAPER_LRS),
    # The same on data that every machine has: 1,500 images of 64 pixels, so a smaller batch and more epochs.
    "digits": Recipe("digits", "digits", "simplenet", batch_size=128, epochs=20, lr=0.4, probe_lrs=_PAPER_LRS),
}
"""The experiments that the command line knows."""
