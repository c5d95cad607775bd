"""Colours of norms: fixed, and distinct in grey."""

from itertools import pairwise

import numpy as np
import pytest

from landscape.plotting.colours import colours_of

PAPER = ["BatchNorm", "GhostNorm (G=16)", "GhostNorm (G=128)", "No normalization"]


def luminance(colour):
    return np.dot(colour, [0.2126, 0.7152, 0.0722])


def test_colours_of_the_paper_differ_in_grey():
    shades = [luminance(colour) for colour in colours_of(PAPER).values()]
    assert all(lighter - darker > 0.1 for lighter, darker in pairwise(shades))


@pytest.mark.parametrize("label", PAPER)
def test_colour_does_not_depend_on_other_bands(label):
    assert colours_of([label])[label] == colours_of(["SeqNorm (G_C=4, G_M=2)", *PAPER, "run 1"])[label]


def test_more_groups_are_darker():
    labels = [f"GhostNorm (G={groups})" for groups in (1, 2, 8, 64, 256)]
    shades = [luminance(colour) for colour in colours_of(labels).values()]
    assert all(lighter > darker for lighter, darker in pairwise(shades))


def test_bands_of_one_norm_and_of_none_are_distinct():
    labels = ["BatchNorm, lr 0.1", "BatchNorm, lr 0.2", "GhostNorm, batch variance (G=4)", "run 1", "run 2", ""]
    colours = colours_of(labels)
    assert list(colours) == labels
    assert len(set(colours.values())) == len(labels)
