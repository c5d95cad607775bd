"""What a trace holds: the names, types and units of its columns, in one place for both sides of the package."""

from dataclasses import dataclass

VERSION = 3
"""Version of the trace format; a reader refuses a trace with a higher one, and reads all lower ones."""


@dataclass(frozen=True)
class Column:
    """One column: its name, its Arrow type in words, its unit, its meaning, and the format that it came with."""

    name: str
    type: str
    unit: str
    meaning: str
    since: int = 1


UPDATES = (
    Column("step", "int64", "updates", "index of the optimizer step since the probe was attached, from 0"),
    Column("epoch", "float64", "epochs", "passes over the data completed before this step; NaN if not known"),
    Column("lr", "float64", "1", "learning rate of the first parameter group at this step"),
    Column("loss", "float64", "loss", "training loss at step size 0, the loss that was differentiated"),
    Column("grad_norm", "float64", "loss / parameter", "l2 norm of the gradient as the optimizer got it"),
    Column(
        "slope",
        "float64",
        "loss / learning rate",
        "inner product of gradient and direction: to first order the loss falls by eta * slope",
        since=2,
    ),
    Column(
        "direction_norm",
        "float64",
        "parameter / learning rate",
        "l2 norm of the direction: a step moves the parameters by |eta| * direction_norm",
        since=2,
    ),
    Column("step_sizes", "list<float64>", "learning rate", "the K step sizes eta"),
    Column("losses", "list<float64>", "loss", "the K losses at theta - eta * direction"),
    Column(
        "gradient_distances",
        "list<float64>",
        "loss / parameter",
        "l2 distances of the K gradients there from the gradient at theta; missing unless they were asked for",
        since=2,
    ),
    Column("loss_min", "float64", "loss", "smallest of the K losses; NaN if one of them is"),
    Column("loss_max", "float64", "loss", "largest of the K losses; NaN if one of them is"),
    Column("seconds", "float64", "s", "time that the host spent on this probe"),
)
"""One row per probed update (``updates-*.parquet``)."""

EPOCHS = (
    Column("epoch", "int64", "epochs", "passes over the training data completed"),
    Column("step", "int64", "updates", "optimizer steps completed"),
    Column("train_loss", "float64", "loss", "mean training loss over the epoch's updates"),
    Column(
        "validation_loss",
        "float64",
        "loss",
        "mean loss on what was held out of the training set; NaN if nothing was",
        3,
    ),
    Column(
        "validation_accuracy", "float64", "1", "fraction of it classified correctly; NaN if nothing was held out", 3
    ),
    Column("test_loss", "float64", "loss", "mean loss on the test set, in evaluation mode; NaN without one"),
    Column("test_accuracy", "float64", "1", "fraction of the test set classified correctly; NaN without one"),
)
"""One row per epoch of a recipe (``epochs-*.parquet``)."""

TABLES = {"updates": UPDATES, "epochs": EPOCHS}
"""The tables of a run, by the prefix of their Parquet parts."""
