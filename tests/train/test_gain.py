"""Which evaluation is the best so far."""

from __future__ import annotations

import math

import pytest

from fastattn.train.evaluating import is_gain
from fastattn.train.metrics import Evaluation


def evaluation(loss: float, f1: float) -> Evaluation:
    return Evaluation(loss, 10, {"f1": f1})


@pytest.mark.parametrize(
    ("new", "old", "best", "gain"),
    [
        ((2.0, 0.5), (1.0, 0.4), ("f1", True), True),
        ((1.0, 0.4), (2.0, 0.5), ("f1", True), False),
        ((1.0, 0.4), (2.0, 0.5), ("f1", False), True),
        ((1.0, 0.0), (2.0, 0.0), ("f1", True), True),
        ((2.0, 0.0), (1.0, 0.0), ("f1", True), False),
        ((1.0, 0.0), (1.0, 0.0), ("f1", True), False),
        ((1.0, 0.0), (2.0, 1.0), ("loss", False), True),
        ((2.0, 0.0), (1.0, math.nan), ("f1", True), True),
        ((1.0, math.nan), (2.0, 0.0), ("f1", True), False),
        ((math.nan, 0.0), (2.0, 0.0), ("f1", True), False),
    ],
)
def test_the_figure_decides_and_of_equal_ones_the_loss(
    new: tuple[float, float], old: tuple[float, float], best: tuple[str, bool], gain: bool
) -> None:
    assert is_gain(evaluation(*new), evaluation(*old), best) == gain
    assert is_gain(evaluation(*new), None, best)
