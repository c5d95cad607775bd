import numpy as np
import pytest
from recordings import frames

from landscape.plotting.text import BLOCKS, sparkline, text_lines


@pytest.mark.parametrize("width", [1, 7, 40, 100])
def test_sparkline_shows_the_largest_value_of_each_column(width):
    values = np.ones(40)
    values[33] = 10.0
    drawn = sparkline(values, width)
    assert len(drawn) == min(width, 40)
    assert drawn.count(BLOCKS[-1]) == (width > 1)


def test_sparkline_of_unusual_values():
    assert sparkline(np.array([]), 5) == "!"
    assert sparkline(np.array([0.0, 0.0]), 5) == BLOCKS[0] * 2
    assert sparkline(np.array([1.0, np.inf, np.nan, 2.0]), 9) == "▁!!█"


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal(width):
    lines = text_lines(frames("batch", "ghost"), width)
    assert [line.split()[0] for line in lines] == ["batch-0", "batch-1", "ghost-0", "ghost-1"]
    assert all(len(line) <= width and "lost" in line for line in lines)
