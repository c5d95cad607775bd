"""Schema of a trace: names, types, units and meanings of its columns."""

from dataclasses import dataclass

VERSION = 5
"""Version of the trace format; older versions are read, newer ones are refused."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: Name of the column.
        type: Arrow type: ``"int64"``, ``"float64"`` or ``"list<float64>"``.
        unit: Unit of the values.
        meaning: Definition of the values.
        since: Format version that introduced the column.
    """

    name: str
    type: str
    unit: str
    meaning: str
    since: int = 1


UPDATES = (
    Column("step", "int64", "updates", "index of the optimizer step since the probe was attached, from 0"),
    Column("epoch", "float64", "epochs", "passes over the data completed before this step; NaN if unknown"),
    Column("lr", "float64", "1", "learning rate at this step, of the first parameter group in which it is not 0"),
    Column("loss", "float64", "loss", "training loss at step size 0, the loss that was differentiated"),
    Column("grad_norm", "float64", "loss / parameter", "l2 norm of the gradient that the optimizer receives"),
    Column(
        "slope",
        "float64",
        "loss / learning rate",
        "inner product of the loss's gradient and the direction: to first order the loss falls by eta * slope",
        since=2,
    ),
    Column(
        "direction_norm",
        "float64",
        "parameter / learning rate",
        "l2 norm of the direction: a step moves the parameters by |eta| * direction_norm",
        since=2,
    ),
    Column(
        "gradient_rest",
        "float64",
        "1",
        "part of the optimizer's gradient that is not along the loss's, relative to it; NaN if unknown",
        since=4,
    ),
    Column("step_sizes", "list<float64>", "learning rate", "the K step sizes eta"),
    Column("losses", "list<float64>", "loss", "the K losses at theta - eta * direction"),
    Column(
        "gradient_distances",
        "list<float64>",
        "loss / parameter",
        "l2 distances of the K gradients there from the gradient at theta; missing without gradients=True",
        since=2,
    ),
    Column(
        "gradient_cosines",
        "list<float64>",
        "1",
        "cosines between the K gradients there and the gradient at theta; missing without gradients=True",
        since=4,
    ),
    Column(
        "critical_step_sizes",
        "list<float64>",
        "learning rate",
        "further step sizes, in the order of the search for the critical step; missing without critical=True",
        since=5,
    ),
    Column("critical_losses", "list<float64>", "loss", "losses there; missing without critical=True", since=5),
    Column("loss_min", "float64", "loss", "smallest loss at step sizes from 0 on (else of all K); NaN if one is NaN"),
    Column("loss_max", "float64", "loss", "largest loss at step sizes from 0 on (else of all K); NaN if one is NaN"),
    Column("seconds", "float64", "s", "time of the host for this probe"),
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
        "mean loss on the images held out of the training set; NaN without any",
        3,
    ),
    Column(
        "validation_accuracy",
        "float64",
        "1",
        "fraction of the held-out images classified correctly; NaN without any",
        3,
    ),
    Column("test_loss", "float64", "loss", "mean loss on the test set, in evaluation mode; NaN without one"),
    Column("test_accuracy", "float64", "1", "fraction of the test set classified correctly; NaN without one"),
)
"""One row per epoch of a recipe (``epochs-*.parquet``)."""

TABLES = {"updates": UPDATES, "epochs": EPOCHS}
"""The tables of a run, by the prefix of their Parquet parts."""
