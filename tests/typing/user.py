"""A user's script, checked by type checkers and never run."""

from pathlib import Path

import torch
from torch import nn

from landscape import (
    RECIPES,
    LandscapeProbe,
    compare,
    convert_norms,
    make_norm,
    plot_landscape,
    read_traces,
    summarize,
    train,
)
from landscape.plotting import LandscapeFigure, save_figure

model: nn.Module = nn.Sequential(nn.Linear(20, 64), make_norm("ghost", groups=4)(64), nn.ReLU(), nn.Linear(64, 2))
model = convert_norms(model, make_norm("batch"))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(32, 20), torch.zeros(32, dtype=torch.long)

with LandscapeProbe(
    model,
    optimizer,
    nn.CrossEntropyLoss(),
    trace=Path("traces/run"),
    facts={"norm": "batch", "seed": 0},
    overwrite=True,
    step_sizes=lambda step: [0.1, 0.2],
    relative=False,
    every=2,
    direction="update",
    steps_per_epoch=4,
    engine="auto",
    max_memory=10**9,
    gradients=True,
    overhead=0.1,
) as probe:
    for _ in range(5):
        optimizer.zero_grad()
        loss: torch.Tensor = probe.observe(lambda model, x, y: nn.functional.cross_entropy(model(x), y), x, y)
        loss.backward()  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownMemberType]  # of torch
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]

checkpoint: dict[str, object] = {"probe": probe.state_dict()}
frame = probe.frame()
columns: list[str] = [str(name) for name in summarize(frame, by=["run"], measure="loss").columns]
figure: LandscapeFigure = plot_landscape(frame, measure=["loss", "beta"], scale="log")
save_figure(figure, Path("landscape.png"))
sentences = str(compare(read_traces("traces"), reference="batch"))
place: Path | str = str(train(RECIPES["digits"], "traces/digits"))

LandscapeProbe(model, optimizer, evry=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
LandscapeProbe(model, optimizer, every="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
