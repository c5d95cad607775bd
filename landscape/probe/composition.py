"""The composition of a differentiated tensor from captured losses, read from autograd's graph."""

import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

_LINEAR = re.compile(
    r"(Add|Sub|Rsub|Neg|Sum|Mean|Stack|Cat|Unbind|Select|View|UnsafeView|ViewAs|Reshape|ReshapeAlias|Squeeze|Unsqueeze"
    r"|Expand|Permute|T|Transpose|Clone|Alias|ToCopy|Copy)Backwards?\d*|CopySlices"
)
_PRODUCT = re.compile(r"(Mul|Dot|Mv|Mm|Bmm)Backward\d*")
_QUOTIENT = re.compile(r"DivBackward\d*")


@dataclass(frozen=True)
class Composition:
    """The composition of a tensor from captured losses.

    For ``0.5 * loss + weight.square().sum()`` the walk starts at the root ``Add``. It ends at the loss, which its key
    marks as captured, and at the parameter, which it reaches by a path with no captured loss on it::

        AddBackward0 ── MulBackward0 ── loss (captured)          reaches_loss: True
              └──────── SumBackward0 ── PowBackward0 ── weight   direct: [weight]

    ``loss.sqrt()`` has the ``nonlinear`` operation "sqrt", and ``loss * loss`` "mul".

    Attributes:
        reaches_loss: True if the tensor depends on a captured loss.
        direct: Parameters on which it depends other than through captured losses.
        nonlinear: An operation on captured losses that is not a weighted sum, if there is one.
    """

    reaches_loss: bool
    direct: list[Tensor]
    nonlinear: str | None

    @classmethod
    def of(cls, roots: Sequence[Any], key: str, parameters: Container[int]) -> Self:
        """Walk autograd's graph from ``roots``, children before parents.

        Args:
            roots: Nodes of the graph; None for a tensor without one.
            key: Key in the ``metadata`` of the nodes of captured losses.
            parameters: Ids of the parameters that ``direct`` may contain.
        """
        reaches: dict[Any, bool] = {}
        direct: list[Tensor] = []
        nonlinear: str | None = None
        stack = [(node, False) for node in roots if node is not None]
        while stack:
            node, is_expanded = stack.pop()
            if is_expanded:
                paths = [reaches.get(child, False) for child, _ in node.next_functions]
                reaches[node] = any(paths)
                if reaches[node] and not _is_weighted_sum(node.name(), paths):
                    nonlinear = re.sub(r"Backward\d*$", "", node.name()).lower()
            elif node not in reaches:
                reaches[node] = key in node.metadata
                if node.name() == "torch::autograd::AccumulateGrad":
                    direct += [node.variable] if id(node.variable) in parameters else []
                elif not reaches[node]:
                    stack.append((node, True))
                    stack += [(child, False) for child, _ in node.next_functions if child is not None]
        return cls(any(reaches[node] for node in roots if node is not None), direct, nonlinear)


def _is_weighted_sum(name: str, paths: Sequence[bool]) -> bool:
    """Return True if a function is linear in captured losses.

    Args:
        name: Name of the function's node.
        paths: For each argument, True if it depends on a captured loss.
    """
    if _PRODUCT.fullmatch(name):
        return sum(paths) == 1
    if _QUOTIENT.fullmatch(name):
        return not any(paths[1:])
    return _LINEAR.fullmatch(name) is not None
