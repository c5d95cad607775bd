import copy

import torch

ENGINES = ["loop", "auto"]
STEP_SIZES = [0.0, 0.7, -0.2, 3.0, 0.7]


def moved_losses(case, direction, step_sizes):
    """Losses of copies of the model, one for each point; the reference for all engines."""
    losses = []
    for eta in step_sizes:
        torch.manual_seed(1)
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in direction:
                    parameter -= eta * direction[name]
            losses.append(case.closure(model))
    return torch.stack(losses)
