"""Norms in models and tools of other people."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.data import DataLoader, Dataset

from landscape import GhostNorm, LandscapeError, SeqNorm, convert_norms, ghost_norm, make_norm
from landscape.norms.functional import batch_group_norm, ghost_mean_norm, group_norm, seq_norm
from landscape.norms.layers import BatchNorm

SEQ = {"groups": 4, "channel_groups": 2}
NORMS = {
    "batch": make_norm("batch"),
    "ghost": make_norm("ghost", groups=4),
    "seq": make_norm("seq", **SEQ),
    "seq-reversed": make_norm("seq-reversed", **SEQ),
    "ghost-mean": make_norm("ghost-mean", groups=4),
    "batch-group": make_norm("batch-group", **SEQ),
    "group": make_norm("group", channel_groups=2),
}
OF_BATCH = [name for name in NORMS if name != "group"]
NATIVE = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input):
        return self.act(super().forward(input))


class FrozenBatchNorm2d(nn.Module):
    """As in torchvision and detectron2."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {"weight": 2.0, "bias": 1.0, "running_mean": 0.5, "running_var": 4.0}.items():
            self.register_buffer(name, torch.full((channels, 1, 1), value))

    def forward(self, input):
        return (input - self.running_mean) / self.running_var.sqrt() * self.weight + self.bias


def scaled():
    norm = nn.BatchNorm2d(8)
    norm.gain = nn.Parameter(torch.ones(1))
    return norm


def patched():
    norm = nn.BatchNorm2d(8)
    norm.forward = lambda input: input
    return norm


def hooked():
    norm = nn.BatchNorm2d(8)
    norm.register_forward_hook(lambda *_: None)
    return norm


def parametrized():
    return nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(8), "weight", nn.Softplus())


@pytest.mark.parametrize(
    ("make", "lost"),
    [
        (partial(BatchNormAct2d, 8), "act"),
        (scaled, "gain"),
        (patched, "forward"),
        (hooked, "hooks"),
        (parametrized, "parametrizations"),
    ],
)
def test_convert_norms_refuses_to_lose_more_than_a_norm(make, lost):
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ModuleDict({"part": make()}))
    modules = list(model.modules())
    with pytest.raises(LandscapeError, match=rf"1\.part: .*{lost}.*nn\.BatchNorm"):
        convert_norms(model, NORMS["ghost"])
    assert list(model.modules()) == modules


def test_convert_norms_of_a_subclass_that_only_normalizes():
    class Renamed(nn.BatchNorm2d):
        def _check_input_dim(self, input):
            pass

    model = convert_norms(nn.Sequential(Renamed(8), BatchNorm(8), nn.SyncBatchNorm(8)), NORMS["ghost"])
    assert [type(norm) for norm in model] == [GhostNorm] * 3
    assert model(torch.randn(8, 8, 2, 2)).shape == (8, 8, 2, 2)


@pytest.mark.parametrize("name", NORMS)
def test_convert_norms_without_a_bias(name):
    old = nn.BatchNorm1d(8)
    old.register_parameter("bias", None)
    model, x = convert_norms(nn.Sequential(old), NORMS[name]), torch.randn(16, 8)
    assert model[0].weight is old.weight
    assert model.state_dict().keys() <= {f"0.{key}" for key in old.state_dict()}
    assert model(x).shape == model.eval()(x).shape == x.shape


def test_convert_norms_leaves_frozen_norms():
    model = nn.Sequential(FrozenBatchNorm2d(8), nn.BatchNorm2d(8))
    convert_norms(model, NORMS["ghost"])
    assert [type(norm) for norm in model] == [FrozenBatchNorm2d, GhostNorm]


def test_convert_norms_of_a_model_that_refers_to_itself():
    model = nn.Sequential(nn.BatchNorm1d(8))
    model.append(nn.Identity())
    model[1].whole = model
    convert_norms(model, NORMS["ghost"])
    assert isinstance(model[0], GhostNorm)


def test_convert_norms_after_torch_compile():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(16, 8)
    compiled(x)
    convert_norms(compiled, NORMS["ghost"])
    torch.testing.assert_close(compiled(x), ghost_norm(model[0](x), 4))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
def test_convert_sync_batchnorm_leaves_norms_of_groups(options):
    layers = {"batch": nn.BatchNorm1d(8), **{name: make(8) for name, make in NORMS.items()}}
    layers |= {"plain": make_norm("ghost", groups=2, **options)(8)}
    model = nn.ModuleDict({"part": nn.ModuleDict(layers)})
    before = dict(model.named_parameters())
    with pytest.warns(UserWarning, match=r"(GhostNorm|SeqNorm|GhostMeanNorm|BatchGroupNorm).*SyncBatchNorm") as said:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)["part"]
    assert len(said) == 6
    assert [name for name, layer in converted.items() if isinstance(layer, nn.SyncBatchNorm)] == ["batch"]
    assert all(converted[name] is layers[name] for name in layers if name != "batch")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_a_new_sync_batchnorm_may_replace_a_norm_of_groups():
    model = nn.Sequential(GhostNorm(8, 2))
    model[0] = nn.SyncBatchNorm(8)
    assert isinstance(model[0], nn.SyncBatchNorm)


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3), (0, 8, 2, 2), (4, 8, 0)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("name", OF_BATCH)
def test_empty_batch_as_batch_norm(name, options, training, shape):
    given = {"batch": {}, "ghost": {"groups": 4}, "ghost-mean": {"groups": 4}}.get(name, SEQ)
    mine, other = make_norm(name, **given)(8), NATIVE[len(shape)](8, **options)
    for option, value in options.items():
        mine = make_norm(name, **given, **{option: value})(8) if value is not None else mine
        setattr(mine, option, value)
    for norm in (mine, other):
        x = torch.zeros(shape, requires_grad=True)
        y = norm.train(training)(x)
        y.sum().backward()
        assert (y.shape, x.grad.shape) == (shape, shape)
        if name != "seq-reversed" or shape[0] == 0:  # torch's group norm of samples without positions has NaN.
            torch.testing.assert_close(norm.weight.grad, torch.zeros(8))
    torch.testing.assert_close(mine.state_dict(), other.state_dict())


@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_batch_functions(layout, dtype):
    x, weight = torch.zeros(0, 8, 2, dtype=dtype), torch.ones(8)
    found = [
        ghost_norm(x, 4, weight, weight, layout=layout),
        seq_norm(x, 4, 2, weight, weight, layout=layout),
        ghost_mean_norm(x, 4, weight, weight, layout=layout)[0],
        batch_group_norm(x, 4, 2, weight, weight, layout=layout)[0],
        group_norm(x, 2, weight.to(dtype), weight.to(dtype)),
    ]
    assert {(y.shape, y.dtype) for y in found} == {(x.shape, dtype)}


def test_empty_batch_changes_no_later_one():
    one, other = GhostNorm(8, 2), GhostNorm(8, 2)
    x = torch.randn(8, 8)
    one(torch.zeros(0, 8))
    torch.testing.assert_close(one(x), other(x))
    torch.testing.assert_close(one.running_var, other.running_var)


@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.parametrize("channels_last", [True, False])
def test_uneven_last_batch(name, channels_last):
    options = {} if name in ("batch", "ghost", "ghost-mean") else {"channel_groups": 2}
    sized = make_norm(name, **options, **({} if name == "batch" else {"group_size": 4}))(8)
    for samples in (16, 16, 7, 5, 2):
        x = torch.randn(samples, 8, 3, 3)
        x = (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
        sized(x).pow(3).sum().backward()
        assert x.grad.isfinite().all()
    assert all(value.isfinite().all() for value in sized.state_dict().values())
    assert sized.eval()(torch.randn(1, 8)).shape == (1, 8)


@pytest.mark.parametrize("samples", [1, 3, 4])
@pytest.mark.parametrize("name", ["ghost", "seq", "seq-reversed"])
def test_last_batch_of_fewer_samples_than_groups_says_what_to_do(name, samples):
    with pytest.raises(LandscapeError, match=rf"groups=4 .*{samples} samples.*group_size.*drop_last"):
        NORMS[name](8)(torch.randn(samples, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NORMS)
def test_autocast_keeps_statistics_in_float32(name, dtype):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), NORMS[name](8), nn.ReLU(inplace=True)), torch.randn(16, 3, 4, 4)
    with torch.autocast("cpu", dtype):
        y = model(x)
        y.float().pow(2).sum().backward()
        expected = copy.deepcopy(model)[1](model[0](x).float())
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), expected.relu(), rtol=0.02, atol=0.02)
    state = model[1].state_dict()
    assert all(value.dtype in (torch.float32, torch.int64) for value in state.values())
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())
    with torch.autocast("cpu", dtype):
        assert model.eval()(x).dtype is dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize("options", [{"groups": 4}, {"group_size": 4}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "interleaved"])
def test_compile_of_changing_batches(options, layout):
    torch._dynamo.reset()
    norm = GhostNorm(8, **options, layout=layout)
    twin = copy.deepcopy(norm)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for samples in (16, 12, 11, 16):
        x, y = (torch.randn(samples, 8, 3, generator=torch.Generator().manual_seed(samples)) for _ in range(2))
        inputs = x.requires_grad_(), y.requires_grad_()
        outputs = compiled(inputs[0]), twin(inputs[1])
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.pow(3).sum(), x) for out, x in zip(outputs, inputs, strict=True))
        )
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("samples", [0, 8])
def test_compile_of_few_samples(samples):
    torch._dynamo.reset()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of 2 values, once
        y = torch.compile(GhostNorm(8, 4), fullgraph=True, backend="aot_eager")(torch.randn(samples, 8))
    assert y.shape == (samples, 8)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_export_with_open_sizes(name, training):
    norm = NORMS[name](8).train(training)
    twin = copy.deepcopy(norm)
    samples, positions = torch.export.Dim("samples", min=1, max=64), torch.export.Dim("positions", min=2, max=64)
    sizes = {0: 4 * samples if training else samples, 2: positions, 3: positions}
    exported = torch.export.export(norm, (torch.randn(16, 8, 5, 5),), dynamic_shapes={"input": sizes}).module()
    for shape in ((16, 8, 5, 5), (8, 8, 3, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported(x), twin(x))
    torch.testing.assert_close(exported.state_dict(), twin.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [name for name in NORMS if name != "batch"])  # torch's, exported as in evaluation
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_export(name, training, dynamo):
    pytest.importorskip("onnxscript")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    model, x, file = nn.Sequential(nn.Linear(6, 8), NORMS[name](8)).train(training), torch.randn(16, 6), io.BytesIO()
    expected = copy.deepcopy(model)(x)
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False, training=mode)
    session = evaluator(file.getvalue())
    (y,) = session.run(None, {session.input_names[0]: x.numpy()})[:1]
    torch.testing.assert_close(torch.from_numpy(y), expected.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_jit_trace(name, training):
    norm, x, file = NORMS[name](8).train(training), torch.randn(16, 8, 3, 3), io.BytesIO()
    twin = copy.deepcopy(norm)
    torch.jit.save(torch.jit.trace(copy.deepcopy(norm), x), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), twin(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NORMS)
def test_jit_script_says_what_to_do(name):
    with pytest.raises(LandscapeError, match=r"torch\.jit\.script.*torch\.export"):
        torch.jit.script(nn.Sequential(NORMS[name](8)))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_fx_records_a_layer(name, training):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), NORMS[name](8)).train(training), torch.randn(16, 3, 4, 4)
    twin = copy.deepcopy(model)
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    torch.testing.assert_close(graph(x), twin(x))
    torch.testing.assert_close(graph.state_dict(), twin.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", NORMS)
def test_quantization_prepares_around_a_norm(name):
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = pytest.importorskip("torch.ao.quantization").get_default_qconfig_mapping()
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), NORMS[name](8), nn.ReLU()).eval(), torch.randn(16, 3, 4, 4)
    prepared = quantize_fx.prepare_fx(model, mapping, (x,))
    torch.testing.assert_close(prepared(x), model(x))
    quantized = quantize_fx.convert_fx(prepared)
    assert type(quantized.get_submodule("1")) is type(model[1])
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_of_a_trained_ghost_norm_as_batch_norm():
    quantization = pytest.importorskip("torch.ao.quantization")

    def model(norm):
        return nn.Sequential(quantization.QuantStub(), nn.Conv2d(3, 8, 1), norm, quantization.DeQuantStub())

    trained, x = model(GhostNorm(8, 4)), torch.randn(16, 3, 4, 4)
    for _ in range(20):
        trained(x)
    deployed = model(nn.BatchNorm2d(8))
    deployed.load_state_dict(trained.state_dict())
    fused = quantization.fuse_modules(deployed.eval(), [["1", "2"]])
    fused.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(fused)
    prepared(x)
    torch.testing.assert_close(quantization.convert(prepared)(x), trained.eval()(x), rtol=0.1, atol=0.1)


def test_fused_convolution_in_evaluation():
    conv, norm, x = nn.Conv2d(3, 8, 1), GhostNorm(8, 4), torch.randn(16, 3, 4, 4)
    norm(conv(x))
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), norm.eval())
    torch.testing.assert_close(fused(x), norm(conv(x)))


@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.parametrize("with_count", [True, False])
def test_checkpoints_of_batch_norm_load_strictly(name, with_count):
    native = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    native(torch.randn(4, 3, 2, 2))
    state = {key: value for key, value in native.state_dict().items() if with_count or "num_batches" not in key}
    model = convert_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), NORMS[name])
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(
        model.state_dict(), {**native.state_dict(), "1.num_batches_tracked": torch.tensor(1 * with_count)}
    )
    native.load_state_dict(model.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_a_count_of_batches_as_batch_norm(momentum):
    mine, other, x = GhostNorm(8, 1, momentum=momentum), nn.BatchNorm1d(8, momentum=momentum), torch.randn(16, 8)
    mine.num_batches_tracked = other.num_batches_tracked = None
    torch.testing.assert_close(mine(x), other(x))
    torch.testing.assert_close(mine.state_dict(), other.state_dict())


class Normalized(Dataset):
    """Samples that a norm made."""

    def __init__(self):
        self.norm = GhostNorm(64, 4)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        with torch.no_grad():
            return self.norm(torch.full((32, 64), float(index)) + torch.arange(32)[:, None])


@pytest.mark.multiprocess
def test_forked_workers_of_a_loader():
    dataset = Normalized()
    expected = torch.stack(list(DataLoader(dataset, batch_size=None)))  # has run in this process, in threads, before
    found = DataLoader(dataset, batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    torch.testing.assert_close(torch.stack(list(found)), expected)


@pytest.mark.parametrize(
    "make", [lambda: nn.DataParallel(GhostNorm(8, 4)), lambda: SeqNorm(8, 4, 2)], ids=["dp", "seq"]
)
def test_copies_of_a_layer(make):
    layer, x = make(), torch.randn(16, 8)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(x), copy.deepcopy(layer)(x))


@pytest.mark.parametrize("name", OF_BATCH)
def test_inference_mode_and_checkpointing(name):
    norm, x = NORMS[name](8), torch.randn(16, 8, 2)
    with torch.inference_mode():
        y = norm(x)
    twin = copy.deepcopy(norm)
    torch.testing.assert_close(norm(x), y.clone())
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.utils.checkpoint.checkpoint(norm, inputs[0], use_reentrant=False).pow(3).sum().backward()
    twin(inputs[1]).pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close([p.grad for p in norm.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize("name", OF_BATCH)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("affine", [True, False])
def test_activations_in_place(name, memory_format, affine):
    options = {"batch": {}, "ghost": {"groups": 4}, "ghost-mean": {"groups": 4}}.get(name, SEQ)
    norm, x = make_norm(name, affine=affine, **options)(8), torch.randn(16, 8, 3, 3).to(memory_format=memory_format)
    gradients = []
    for act in (F.relu, F.relu_):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_(), *norm.parameters()
        gradients.append(torch.autograd.grad(act(norm(inputs[0])).pow(3).sum(), inputs))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
