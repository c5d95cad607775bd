"""Awkward models and loops: replays equal moved copies of the model, or are refused."""

import copy
import itertools
import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lab import STEP_SIZES, batches, check_same_training
from torch import nn
from torch.func import hessian, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from landscape import LandscapeError, LandscapeProbe, make_norm, ray_losses

ETAS = [0.0, 0.7, -0.2, 3.0]


def bug(value, reason):
    """Mark a case in which the tape is wrong at present."""
    return pytest.param(value, marks=pytest.mark.xfail(strict=True, reason=reason))


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def cases(table, bugs=()):
    """Return parameters for the names of a table, with those that are bugs marked."""
    return [bug(name, bugs[name]) if name in bugs else name for name in table]


class Model(nn.Module):
    """Two linear layers and other parts, with a function as forward pass."""

    def __init__(self, function, **parts):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(6, 6), nn.Linear(6, 3), function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


class Tanh(torch.autograd.Function):
    """Hyperbolic tangent, computed where the dispatcher does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        np.tanh(x.detach().numpy(), out=out.numpy())
        return out

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Sign(torch.autograd.Function):
    """Sign, with the derivative of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Tripled(torch.autograd.Function):
    """Identity, with three times its derivative."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


def then(value, *steps):
    """Return a value after functions were called with it."""
    for step in steps:
        step(value)
    return value


def packed(m, x):
    lengths = torch.arange(12) % 2 + 1
    rows = pack_padded_sequence(x.view(12, 2, 3), lengths, batch_first=True, enforce_sorted=False)
    return m.head(pad_packed_sequence(m.rnn(rows)[0], batch_first=True)[0].sum(1))


def rows_into_zeros(m, x):
    out, hidden = torch.zeros(12, 6, dtype=x.dtype), m.a(x)
    row, flat = out[3], out.view(-1)
    for k in range(12):
        out[k] = hidden[k].tanh()
    return m.b(out) + row.sum() + flat[20]


def teacher(m, x):
    with torch.no_grad():
        for p, q in zip(m.other.parameters(), m.b.parameters(), strict=True):
            p.mul_(0.9).add_(q, alpha=0.1)
        target = m.other(x)
    return m.b(m.a(x)) + 0.3 * target


def inference(m, x):
    with torch.inference_mode():
        shift = m.a(x).relu().mean(0)
    return m.b(m.a(x) + shift)


def attended(m, x):
    q = m.a(x).view(2, 6, 1, 6).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, q, q, dropout_p=0.2, is_causal=True)
    return m.b(out.transpose(1, 2).reshape(12, 6))


def sums_of_products(m, x):
    w, ones = m.b.weight.t(), torch.ones(3, dtype=x.dtype)
    product = x @ w
    terms = [torch.addmm(m.b.bias, x, w, alpha=3.0, beta=2.0), torch.addmm(ones, x, w, alpha=3.0), 2 - product]
    terms += [torch.add(m.b.bias, product, alpha=2), torch.sub(x[:, :3], product, alpha=2), product - 1.5]
    return sum(terms) + m.b(m.a(x)) + torch.mm(m.b.weight, x.t()).t() + x @ (m.a.weight @ m.a.weight) @ w


def state_read_and_written(m, x):
    hidden = m.norm(m.a(x))
    return m.b(hidden - m.norm.running_mean + m.norm(hidden))


def with_rnn(kind, width=4, **options):
    both = 2 if options.get("bidirectional") else 1
    return {"rnn": kind(3, width, batch_first=True, **options), "head": nn.Linear(both * width, 3)}


def last(m, x):
    return m.head(m.rnn(x.view(12, 2, 3))[0][:, -1])


MODELS = {
    "LSTM": lambda: Model(last, **with_rnn(nn.LSTM, bidirectional=True, num_layers=2, dropout=0.3)),
    "GRU": lambda: Model(last, **with_rnn(nn.GRU, bidirectional=True, num_layers=2, dropout=0.3)),
    "packed sequences": lambda: Model(packed, **with_rnn(nn.LSTM)),
    "LSTM cell": lambda: Model(lambda m, x: m.b(m.cell(x)[0]), cell=nn.LSTMCell(6, 6)),
    "attention": lambda: Model(
        lambda m, x: m.b(m.mha(x[:, None], x.view(12, 1, 6), x[:, None])[0][:, 0]),
        mha=nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True),
    ),
    "scaled dot products": lambda: Model(attended),
    "spectral norm": lambda: Model(lambda m, x: m.b(m.n(x)), n=parametrizations.spectral_norm(nn.Linear(6, 6))),
    "weight norm": lambda: Model(lambda m, x: m.b(m.n(x)), n=parametrizations.weight_norm(nn.Linear(6, 6))),
    "orthogonal": lambda: Model(lambda m, x: m.b(m.n(x)), n=parametrizations.orthogonal(nn.Linear(6, 6))),
    "tied transposed": lambda: Model(lambda m, x: m.b(m.a(x).relu() @ m.a.weight.t())),
    "teacher written in the forward pass": lambda: Model(teacher, other=nn.Linear(6, 3).requires_grad_(False)),
    "statistics read and written": lambda: Model(state_read_and_written, norm=nn.BatchNorm1d(6)),
    "cumulative statistics": lambda: Model(state_read_and_written, norm=nn.BatchNorm1d(6, momentum=None)),
    "sums of products": lambda: Model(sums_of_products),
    "product written": lambda: Model(
        lambda m, x: m.b(then(x @ m.a.weight, lambda h: h.add_(1), lambda h: h[0].mul_(2)))
    ),
    "rows into zeros": lambda: Model(rows_into_zeros),
    "views written": lambda: Model(
        lambda m, x: m.b(
            then(m.a(x) + 0, lambda h: h[:6].mul_(2), lambda h: h.t()[1].add_(1), lambda h: h.view(-1)[::7].exp_())
        )
    ),
    "unseen views written": lambda: Model(
        lambda m, x: m.b(then(m.a(x) + 0, lambda h: h.unsafe_chunk(2, 1)[0].mul_(3)))
    ),
    "data written": lambda: Model(
        lambda m, x: m.b(then(m.a(x) + 0, lambda h: h.data.mul_(2), lambda h: h.detach().add_(1)))
    ),
    "data assigned": lambda: Model(lambda m, x: m.b(then(m.a(x) + 0, lambda h: setattr(h, "data", h.data * 2)))),
    "geometry changed in place": lambda: Model(
        lambda m, x: m.b(then(m.a(x) + 0, torch.Tensor.t_, lambda h: h[0].mul_(2), torch.Tensor.t_))
    ),
    "written out": lambda: Model(
        lambda m, x: m.b(m.a(x)) + m.b(torch.mul(m.a(x).detach(), 2, out=torch.empty(0, dtype=x.dtype)))
    ),
    "index_put_": lambda: Model(
        lambda m, x: m.b(then(torch.zeros_like(x), lambda z: z.__setitem__((slice(None), [1, 2]), m.a(x)[:, :2])))
    ),
    "sorted": lambda: Model(lambda m, x: m.b(torch.zeros_like(x).scatter_(1, m.a(x).argsort(1), m.a(x)))),
    "foreach": lambda: Model(
        lambda m, x: (lambda hs: (torch._foreach_mul_(hs, 2.0), m.b(hs[0] + hs[1]))[1])([m.a(x) + 0, m.a(x) * 3])
    ),
    "expanded": lambda: Model(lambda m, x: m.b(m.a(x) + m.a.bias.expand(12, 6) * m.a.weight[:1].expand(12, -1))),
    "masked, same size": lambda: Model(lambda m, x: m.b(m.a(x)) + m.a(x)[m.a(x) > -1e9].mean()),
    "a Function's sign": lambda: Model(lambda m, x: m.b(m.a(x) + Sign.apply(m.a(x)))),
    "a Function's derivative": lambda: Model(lambda m, x: m.b(m.a(x)) + Tripled.apply(0 * m.b(x))),
    "vmap": lambda: Model(lambda m, x: vmap(lambda row: m.b(m.a(row).relu()))(x)),
    "vmap, random": lambda: Model(lambda m, x: vmap(lambda r: F.dropout(m.b(m.a(r))), randomness="different")(x)),
    "jvp": lambda: Model(lambda m, x: sum(jvp(lambda z: m.b(m.a(z).tanh()), (x,), (torch.ones_like(x),)))),
    "vjp": lambda: Model(lambda m, x: m.b(vjp(lambda z: m.a(z).tanh(), x)[1](torch.ones_like(x))[0])),
    "jacrev": lambda: Model(lambda m, x: m.b(m.a(x) + vmap(jacrev(lambda z: m.a(z).tanh()))(x).sum(1))),
    "hessian": lambda: Model(lambda m, x: m.b(m.a(x) + vmap(hessian(lambda z: m.a(z).tanh().sum()))(x).sum(1))),
    "random by values": lambda: Model(
        lambda m, x: m.b(torch.normal(m.a(x).detach(), 0.1) + m.a(x) + torch.bernoulli(m.a(x).sigmoid().detach()))
    ),
    "random leaky relu": lambda: Model(lambda m, x: m.b(F.rrelu(m.a(x), training=True))),
    "gumbel": lambda: Model(lambda m, x: m.b(F.gumbel_softmax(m.a(x), hard=True))),
    "dropout of a transposed tensor": lambda: Model(lambda m, x: m.b(F.dropout(m.a(x).t(), 0.4).t())),
    "sparse constant": lambda: Model(lambda m, x: m.b(torch.sparse.mm(x.relu().to_sparse(), m.a.weight.t()))),
    "linear algebra": lambda: Model(
        lambda m, x: m.b(m.a(x)) + torch.linalg.svdvals(m.a.weight).sum() + torch.linalg.matrix_norm(m.b.weight, 2)
    ),
    "values as numbers of a list": lambda: Model(lambda m, x: m.b(m.a(x)) * m.a(x).abs().mean(0).tolist()[0]),
    "order by numpy": lambda: Model(
        lambda m, x: m.b(m.a(x)[torch.from_numpy(m.a(x)[:, 0].detach().numpy().argsort().copy())])
    ),
    "written by numpy": lambda: Model(lambda m, x: m.b(then(m.a(x) + 0, lambda h: h.detach().numpy().fill(0)))),
    "kernel in a Function": lambda: Model(lambda m, x: m.b(m.a(x) + Tanh.apply(m.a(x)))),
    "sparse values without gradient": lambda: Model(
        lambda m, x: m.b(m.a(x)) + torch.sparse.mm(m.a(x).detach().relu().to_sparse(), m.b.weight.t())
    ),
    "inference mode": lambda: Model(inference),
    "tensor of numbers": lambda: Model(lambda m, x: m.b(m.a(x)) * torch.tensor([m.a(x)[0, 0], m.a(x)[0, 1]]).sum()),
    "set_": lambda: Model(lambda m, x: m.b(m.a(x) + torch.empty(0, dtype=x.dtype).set_(m.a(x).detach()))),
    "nested tensors": lambda: Model(lambda m, x: m.b(torch.nested.as_nested_tensor([*m.a(x)]).to_padded_tensor(0.0))),
}
"""Models of 12 rows of 6 values. All of them must be measured right, or be refused."""
WRONG = {
    "inference mode": "nothing is recorded in inference mode",
    "tensor of numbers": "torch.tensor reads numbers without a call",
}
UNREPEATABLE = {
    "values as numbers of a list",
    "order by numpy",
    "written by numpy",
    "kernel in a Function",
    "sparse values without gradient",
    "set_",
    "nested tensors",
}
"""Models that may be refused instead."""


def trained(make, before=None, after=None, others=tuple, loss=lambda m, x, y: F.cross_entropy(m(x), y)):
    """Return a trial; ``before`` and ``after`` are called with the model and others at each update."""

    def trial(lab):
        model, *rest = make().double(), *(other.double() for other in others())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with lab.attached(model, optimizer):
            for x, y in batches():
                if before:
                    before(model, *rest)
                lab.copy_modules(model, *rest)
                optimizer.zero_grad()
                total = loss(model, *rest, x, y)
                total.backward()
                lab.record_update(total, lambda *modules, x=x, y=y: loss(*modules, x, y))
                optimizer.step()
                if after:
                    after(model, *rest)
        lab.record_state(model, *rest)

    return trial


def check(trial, least=4, **options):
    """Check that training is the same, and that each row equals moved copies, at step size 0 in all bits."""
    result = check_same_training(trial, alone=True, **options)
    assert len(result.frame) >= least, result.warnings
    for _, row in result.frame.iterrows():
        step = int(row["step"])
        assert row["losses"][0] == result.losses[step]
        assert list(row["losses"]) == pytest.approx(result.references[step], rel=1e-11), step


@pytest.mark.parametrize("name", cases(MODELS, WRONG))
def test_rows_equal_copies_or_are_refused(name):
    try:
        check(trained(MODELS[name]), least=0 if name in UNREPEATABLE else 4)
    except LandscapeError:
        assert name in UNREPEATABLE


@pytest.mark.parametrize("name", cases(MODELS, WRONG))
def test_ray_losses_equal_copies(name):
    torch.manual_seed(0)
    model, (x, y) = MODELS[name]().double(), next(batches())
    direction = {n: 0.3 * torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    expected = []
    for eta in ETAS:
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for n, p in moved.named_parameters():
                p -= eta * direction.get(n, torch.zeros_like(p))
            torch.manual_seed(1)
            expected.append(F.cross_entropy(moved(x), y))
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the loop may take the ray
        losses = ray_losses(model, lambda m: F.cross_entropy(m(x), y), direction, ETAS, engine="tape")
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-11, atol=1e-12)


REFUSED = {
    "number": (lambda m, x: m.b(m.a(x)) * m.a(x).abs().mean().item(), r"reads 0\.\d+ where it read 0\.\d+ in training"),
    "shape by values": (lambda m, x: m.b(m.a(x)) * m.a(x)[m.a(x) > 0.3].mean(), r"reads \[\(\d+,\)\] where it read"),
    "values from elsewhere": (
        lambda m, x: m.b(then(m.a(x) + 0, lambda h: setattr(h, "data", torch.ones_like(h.data)))),
        "computed before",
    ),
    "resized": (lambda m, x: m.b(m.a(x).detach().clone().resize_(12, 6)) + m.b(m.a(x)), "resize_.* cannot be repeated"),
    "sparse": (lambda m, x: m.b(m.a(x)) + torch.sparse.mm(m.a(x).to_sparse(), m.b.weight.t()), "sparse"),
    "numpy in a Function": (lambda m, x: m.b(Tanh.apply(m.a(x))), "cannot be repeated|does not depend"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """The message names the reason, and says what to do."""
    function, message = REFUSED[name]
    wide = [0.0, 3.0]
    torch.manual_seed(0)
    model, (x, y) = Model(function).double(), next(batches())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(LandscapeError, match=message) as error, LandscapeProbe(model, optimizer, step_sizes=wide):  # noqa: PT012
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert "probe.observe" in str(error.value) or name == "numpy in a Function"


def each(change):
    """Return a function that changes each parameter of a model."""
    return lambda model, *rest: [change(parameter) for parameter in model.parameters()]


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def validate(model, *rest):
    model.eval()
    with torch.no_grad():
        for x, y in batches(3, seed=9):
            F.cross_entropy(model(x), y).item()
    model.train()


@torch.no_grad()
def averaged(model, teacher):
    for p, q in zip(model.parameters(), teacher.parameters(), strict=True):
        q.mul_(0.9).add_(p, alpha=0.1)


@torch.no_grad()
def swapped_validation(model, teacher):
    averaged(model, teacher)
    kept = [parameter.clone() for parameter in model.parameters()]
    model.load_state_dict(teacher.state_dict())
    validate(model)
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.copy_(value)


def exchanged_validation(model, teacher):
    for _ in range(2):
        validate(model)
        for p, q in zip(model.parameters(), teacher.parameters(), strict=True):
            p.data, q.data = q.data, p.data


def distilled(loss):
    def total(model, teacher, x, y):
        with torch.no_grad():
            target = teacher(x)
        return F.cross_entropy(model(x), y) + loss(model(x), target)

    return total


class Target(Model):
    """A model and its average, which the loop moves."""

    def __init__(self):
        super().__init__(lambda m, x: m.a(x)[:, :3] + 0.5 * m.target(x), target=nn.Linear(6, 3).requires_grad_(False))

    @torch.no_grad()
    def update(self):
        self.target.weight.mul_(0.9).add_(self.a.weight[:3], alpha=0.1)


class Logged(nn.Sequential):
    def forward(self, x):
        out = super().forward(x)
        self.size = None if self.training else out.norm().item()
        return out


def frozen():
    return (net().requires_grad_(False),)


def masked(parameter):
    parameter.data = parameter.data * (torch.arange(parameter.numel()).view(parameter.shape) % 2)


LOOPS = {
    "clamped": trained(net, after=torch.no_grad()(each(lambda p: p.clamp_(-0.2, 0.2)))),
    "clamped data": trained(net, before=each(lambda p: p.data.clamp_(-0.2, 0.2))),
    "loaded": trained(net, after=lambda m: m.load_state_dict({k: 0.9 * v for k, v in m.state_dict().items()})),
    "validation after": trained(net, after=validate),
    "average for validation": trained(
        net, after=swapped_validation, others=frozen, loss=lambda m, t, x, y: F.cross_entropy(m(x), y)
    ),
    "exchanged for validation": trained(
        net, after=exchanged_validation, others=frozen, loss=lambda m, t, x, y: F.cross_entropy(m(x), y)
    ),
    "average as a target": trained(net, after=averaged, others=frozen, loss=distilled(F.mse_loss)),
    "adversarial": trained(
        net, loss=lambda m, x, y: F.cross_entropy(m(x + 0 * torch.autograd.grad(m(x).sum(), m[0].weight)[0].sum()), y)
    ),
    "label smoothing": trained(net, loss=lambda m, x, y: F.cross_entropy(m(x), y, label_smoothing=0.1)),
    "numbers read by the loop": trained(
        net,
        loss=lambda m, x, y: then(
            F.cross_entropy(m(x), y), torch.Tensor.item, torch.Tensor.tolist, lambda loss: loss.detach().numpy()
        ),
    ),
    "checkpoints": trained(
        lambda: Model(lambda m, x: m.b(checkpoint(lambda h: F.dropout(m.a(h)).relu(), x, use_reentrant=False)))
    ),
    "validation before": trained(net, before=validate),
    "data assigned by the loop": trained(net, after=each(lambda p: setattr(p, "data", p.data.clone()))),
    "masked by the loop": trained(net, before=torch.no_grad()(each(masked))),
    "average as a target of a module": trained(net, after=averaged, others=frozen, loss=distilled(nn.MSELoss())),
    "average within the model": trained(Target, after=Target.update),
    "a number read in validation": trained(lambda: Logged(*net()), after=validate),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_equal_copies(name):
    check(LOOPS[name])


GRADIENTS = {
    "plain": net,
    "LSTM": MODELS["LSTM"],
    "rows into zeros": MODELS["rows into zeros"],
    "views written": MODELS["views written"],
    "detached": lambda: Model(lambda m, x: (lambda h: m.b(h * h.detach()))(m.a(x))),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "branch": lambda: Model(lambda m, x: m.b(m.a(x)) if m.a(x).sum() > -1e9 else x),
    "identity of a Function": lambda: Model(lambda m, x: m.b(Tripled.apply(m.a(x) + 0))),
    "hook": lambda: Model(
        lambda m, x: m.b(then(m.a(x) + 0, lambda h: h.requires_grad and h.register_hook(lambda g: 3 * g)))
    ),
    "complex": lambda: Model(
        lambda m, x: m.b(
            torch.view_as_real(
                torch.view_as_complex(m.a(x).view(12, 3, 2)) * torch.view_as_complex(m.a.weight.view(18, 2))[:3].conj()
            ).reshape(12, 6)
        )
    ),
}
WRONG_GRADIENTS = {
    "hook": "hooks are not recorded",
}


OWN_DERIVATIVES = {"identity of a Function", "complex"}
"""Models with derivatives that are not those of their recorded calls."""


@pytest.mark.parametrize("name", cases(GRADIENTS, WRONG_GRADIENTS))
def test_gradients_equal_loop_or_are_refused(name):
    frames = {}
    for engine in ("loop", "tape"):
        torch.manual_seed(0)
        model = GRADIENTS[name]().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        refused = engine == "tape" and name in OWN_DERIVATIVES
        with (
            pytest.raises(LandscapeError, match="derivative") if refused else nullcontext(),
            LandscapeProbe(model, optimizer, step_sizes=STEP_SIZES, engine=engine, gradients=True) as probe,
        ):
            for x, y in batches():
                optimizer.zero_grad()
                loss = lambda m, x=x, y=y: F.cross_entropy(m(x), y)  # noqa: E731
                (probe.observe(loss) if engine == "loop" else loss(model)).backward()
                optimizer.step()
        if refused:
            return
        frames[engine] = probe.frame()
    for row, expected in zip(frames["tape"]["gradient_distances"], frames["loop"]["gradient_distances"], strict=True):
        assert all(math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-10) for a, b in zip(row, expected, strict=True))


@pytest.mark.parametrize("norm", ["ghost", "seq", "ghost-mean"])
def test_gradients_of_our_norms_are_on_the_tape(norm):
    """Their operator has the derivative of training."""
    frames = []
    for engine in ("tape", "loop"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), make_norm(norm, groups=4)(8), nn.ReLU(), nn.Linear(8, 3)).double()
        optimizer, criterion = torch.optim.SGD(model.parameters(), lr=0.1), nn.CrossEntropyLoss()
        with LandscapeProbe(model, optimizer, criterion, engine=engine, gradients=True) as probe:
            for x, y in itertools.islice(batches(), 3):
                optimizer.zero_grad()
                criterion(model(x), y).backward()
                optimizer.step()
        frames.append(probe.frame())
    assert [frame["engine"].iloc[-1] for frame in frames] == ["tape", "loop"]
    for column in ("losses", "gradient_distances", "gradient_cosines"):
        found, expected = (np.stack(frame[column].tolist()) for frame in frames)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
