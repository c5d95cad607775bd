"""Messages of updates that cannot be captured, with their remedies."""

OBSERVE = "Pass the loss to the probe: `loss = probe.observe(lambda model: ...)`, once for each backward pass."
OBSERVE_WHOLE = (
    "Pass all of it to probe.observe, in a probe without a criterion: "
    "`loss = probe.observe(lambda model, inputs, targets: ..., inputs, targets)`."
)

# The optimizer's gradient is that of no captured loss.
STALE_GRADIENTS = (
    "Gradients were not cleared after the last step, so the optimizer gets a sum over several updates, which is the "
    "gradient of no loss at these parameters. Call optimizer.zero_grad() once for each update."
)
WRITTEN_PARAMETERS = (
    "Parameters were written to between the forward pass and the optimizer's step, so the gradient is not that at the "
    "start of the update. Another optimizer may have made its step: give the probe all that step together, "
    "LandscapeProbe(model, [first, second]), or the one that steps first. A loop that writes to parameters itself, as "
    "in sharpness-aware minimization, cannot be measured."
)
UNKNOWN_LOSS = "A backward pass that went through no captured loss has added to the gradient. " + OBSERVE_WHOLE
NONLINEAR = "The differentiated tensor is not a weighted sum of the captured losses, but their {}. " + OBSERVE_WHOLE
DIRECT_PARAMETER = (
    "The differentiated tensor depends on {!r} other than through the captured losses (a penalty, a second loss). "
    + OBSERVE_WHOLE
)

NOT_RECORDED = "the backward pass did not begin at tensors whose computation was recorded"

# A replay would not compute the captured loss again.
DERIVED_INPUT = (
    "{} was computed from parameters that the optimizer holds (a recurrent state, features, a second call of the "
    "model), and a replay would treat it as constant. Compute all of it in one closure, from inputs that do not depend "
    "on the parameters: probe.observe(lambda model, inputs, targets: ..., inputs, targets). If it is meant to be "
    "constant, detach it."
)
CHANGED_CRITERION = (
    "Between the calls of the model and of the criterion, the loop has changed the criterion, or has drawn random "
    "numbers before the criterion does, which a replay does not repeat. Compute all of it in one closure: "
    "probe.observe(lambda model, inputs, targets: ..., inputs, targets)."
)
NO_MODEL_CALL = "The criterion was called without a call of the model before it. " + OBSERVE
WRITTEN_OUTPUT = "An output of the model was changed in place after the forward pass. " + OBSERVE
DERIVED_OUTPUT = (
    "The criterion was given a tensor that was computed from the model's outputs (or by another call of the model), so "
    "criterion(model(inputs), targets) is not the training loss. " + OBSERVE
)
WRITTEN_ARGUMENT = (
    "The tensor {} among the arguments of {} ({}) was overwritten before the optimizer's step, so the loss cannot be "
    "computed again. Pass a copy of it: tensor.clone()."
)
WRAPPER_CALLED = (
    "An observed loss called the DistributedDataParallel model, whose collectives are those of training. Call the "
    "model that the closure is given: probe.observe(lambda model, x: ...)."
)

# No loss was captured.
CLEARED_GRADIENTS = "Gradients were cleared between the backward pass and the step, so the update is that of no loss."
STEP_IN_BACKWARD = (
    "The optimizer made its step within the backward pass, before the gradient was complete, so there is no update of "
    "all parameters to measure. Call optimizer.step() after loss.backward()."
)
FUNCTORCH = (
    "The model was called within a transform of torch.func, whose derivatives the probe cannot observe. Call "
    "loss.backward(), or measure single rays by landscape.ray_losses."
)
UNSEEN_BACKWARD = (
    "The loss was not differentiated by loss.backward() or torch.autograd.backward(...), called by this name, so it is "
    "unknown whether its gradient is that of the update. Call loss.backward()."
)
UNEVEN_INPUTS = (
    "Under torch.distributed.algorithms.join.Join, processes that have no batches left cannot take part in a probe. "
    "Give every process as many batches, as DistributedSampler(..., drop_last=True) does, and leave out Join."
)
NO_LOSS = "No loss was captured since the last step. " + OBSERVE
NO_STEP = (
    "Losses were differentiated, but the optimizer that the probe was given has made no step, so nothing is recorded. "
    "Give the probe the optimizer whose step() the loop calls. Sharpness-aware minimization in two calls (first_step, "
    "second_step) cannot be probed; by optimizer.step(closure) it can."
)

# With several optimizers, what was measured before the first step is not the update that they make.
NO_COMMON_STEP = (
    "{} made no step before the next forward pass with gradients, so that the update is not along the gradients of "
    "all optimizers. Give the probe those that step together, and evaluate the model between their steps under "
    "torch.no_grad()."
)
CHANGED_GRADIENT = (
    "The gradient that {} gets was changed after another optimizer's step. Change gradients (clipping) before the "
    "first step."
)

# The next update is probed.
LAZY_PARAMETERS = "The forward pass has created parameters of lazy modules; the next update is probed."
WRITTEN_FROZEN = "The forward pass writes to frozen parameters; they are copied from the next update on."
