"""The verdict on what training in 8 bits learns."""

from __future__ import annotations

import pytest

from benchmarks import fp8_quality
from benchmarks.contenders import parse_entries
from benchmarks.rows import ROWS


@pytest.mark.parametrize(("judged", "passed"), [(1.51, True), (1.49, True), (1.53, False), (1.46, False)])
def test_the_bar_is_two_percent_of_the_exact_improvement(judged, passed, capsys):
    runs = {name: {"losses": [2.0, 1.6], "after": 1.5, "judged": 1.5} for name in fp8_quality.RUNS}
    runs["fp8"]["judged"] = judged
    verdict = fp8_quality.judge(runs, 2.5)
    assert verdict["passed"] == passed
    assert verdict["relative_difference"]["fp8"] == pytest.approx(1.5 - judged)
    fp8_quality.show(runs, verdict)
    assert ("passed" in capsys.readouterr().out) == passed


def test_the_row_asks_for_fp8_where_it_says_so():
    row = ROWS["8b-fast"]
    asked = {entry.label: row.work_of(entry).options for entry in parse_entries(row.contenders)}
    asked = {label: options for label, options in asked.items() if options}
    assert asked == {"jaxsloth-torch:none:compute=fp8": {"compute": "fp8"}}
