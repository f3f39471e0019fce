"""The measuring itself: a wrong number must miss."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from jaxsloth.parity.measure import Measurement, max_abs, relative_frobenius, top1_disagreements
from jaxsloth.parity.run import report


@pytest.mark.parametrize(
    ("value", "bar", "sense", "passed"),
    [
        (1.0, 1.0, "at most", True),
        (1.1, 1.0, "at most", False),
        (float("nan"), 1.0, "at most", False),
        (1.1, 1.0, "above", True),
        (1.0, 1.0, "above", False),
        (float("nan"), 1.0, "above", False),
    ],
)
def test_passed(value, bar, sense, passed):
    assert Measurement("L2", "x", value, bar, sense).passed is passed


def test_distances():
    a, b = np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]])
    assert max_abs(a, b) == 0.5
    assert relative_frobenius(b, a) == pytest.approx(0.1)
    assert relative_frobenius(np.zeros(2), np.zeros(2)) == 0.0
    assert np.isnan(max_abs(np.array([np.nan]), np.array([0.0])))
    with pytest.raises(ValueError, match="shapes"):
        max_abs(a, b[0])


def test_top1_counts_decided_rows_only():
    judge = np.array([[0.0, 1.0], [0.0, 1e-4], [2.0, 0.0]])
    ours = np.array([[1.0, 0.0], [1e-4, 0.0], [2.0, 0.0]])
    assert top1_disagreements(ours, judge, gap=2e-3) == 1


def test_report_shows_every_rung_and_what_was_missed():
    out = io.StringIO()
    measured = report([Measurement("L2", "fine", 0.5, 1.0), Measurement("L3", "bad", 2.0, 1.0)], Console(file=out, width=120))
    assert [m.passed for m in measured] == [True, False]
    text = out.getvalue()
    assert "L2" in text and "L3" in text and text.count("MISSED") == 1
