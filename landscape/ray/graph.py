"""Autograd's graph of a tensor."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def graph_nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield the nodes of a tensor's graph, each once."""
    nodes, seen = [tensor.grad_fn], set[Any]()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes += [child for child, _ in node.next_functions]
