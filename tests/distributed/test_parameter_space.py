import pytest
import torch
from torch import nn

from benchmarks.launches import count
from landscape.distributed.parameter_space import WholeParameters, clones, foreach_groups, write


class Own(torch.Tensor):
    """A tensor that takes calls itself, and knows no lists."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert "_foreach" not in func.name()
        with torch._C._DisableTorchDispatch():
            result = func(*args, **(kwargs or {}))
        return torch.Tensor._make_subclass(cls, result) if isinstance(result, torch.Tensor) else result


TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "channels last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": torch.arange(3.0).expand(2, 3),
    "double": torch.arange(3.0, dtype=torch.float64),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "empty": torch.zeros(0, 3),
    "not finite": torch.tensor([torch.nan, torch.inf, -0.0]),
    "parameter": nn.Parameter(torch.ones(2)),
    "derived": nn.Parameter(torch.ones(2)) * 2,
    "sparse": torch.eye(3).to_sparse(),
    "subclass": torch.Tensor._make_subclass(Own, torch.ones(2)),
}


@pytest.mark.parametrize(
    "names", [[name] for name in TENSORS] + [list(TENSORS)], ids=lambda names: " ".join(names)[:20]
)
def test_clones_equal_detached_clones(names):
    copies = clones({name: TENSORS[name] for name in names})
    assert list(copies) == names
    for name, copy in copies.items():
        expected = TENSORS[name].detach().clone()
        assert type(copy) is type(expected)
        assert (copy.layout, copy.dtype, copy.requires_grad) == (expected.layout, expected.dtype, False)
        assert copy.is_sparse or copy.stride() == expected.stride()
        torch.testing.assert_close(copy, expected, rtol=0, atol=0, equal_nan=True)
        if copy.layout is torch.strided and copy.numel():
            assert copy.data_ptr() != TENSORS[name].data_ptr()


def test_launches_of_clones():
    """They depend on the types of the tensors, not on their number."""
    many = {at: torch.ones(3) for at in range(50)}
    assert count("cpu", lambda: clones(many)) == 1
    assert count("cpu", lambda: clones(many | {"double": TENSORS["double"], "count": TENSORS["count"]})) == 3


@torch.no_grad()
def test_write_converts_and_keeps_memory():
    targets = {
        "half": torch.zeros(3, dtype=torch.bfloat16),
        "sparse": torch.zeros(3, 3).to_sparse(),
        "other": torch.ones(1),
    }
    held = dict(targets)
    write({"half": torch.tensor([1.0, 2.0, 3.0]), "sparse": TENSORS["sparse"]}, targets)
    assert held["half"].tolist() == [1, 2, 3]
    assert torch.equal(held["sparse"].to_dense(), torch.eye(3))
    assert held["other"].item() == 1


def test_groups_of_rows():
    one, two, double, sparse = torch.ones(1), torch.ones(2), TENSORS["double"], TENSORS["sparse"]
    others, groups = foreach_groups([(one, two), (double, double), (two, sparse), (two, one)])
    assert [tuple(map(id, row)) for row in others] == [(id(two), id(sparse))]
    found = [[list(map(id, column)) for column in group] for group in groups]
    assert found == [[[id(one), id(two)], [id(two), id(one)]], [[id(double)], [id(double)]]]
    assert foreach_groups([]) == ([], [])


def test_norm_and_inner_of_mixed_types():
    space = WholeParameters(nn.Linear(1, 1))
    torch.manual_seed(0)
    a = {"single": torch.randn(50), "half": torch.randn(3).half() * 6e4, "double": torch.randn(2).double()}
    a |= {"empty": torch.zeros(0), "sparse": torch.eye(3).to_sparse()}
    whole = torch.cat([tensor.to_dense().double().flatten() for tensor in a.values()])
    assert space.norm(a).item() == pytest.approx(whole.norm().item(), rel=1e-6)
    assert space.inner(a, a).item() == pytest.approx(whole.dot(whole).item(), rel=1e-6)
