# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and how shares and differences are written in them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from scripts.studies.figures import Row


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    assert len({len(line) for line in lines}) == 1, f"rows of different lengths under {lines[0]}"
    return "\n".join(re.sub(" +", " ", f"| {' | '.join(cells)} |") for cells in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(value: float) -> str:
    """A difference in points, with its sign; 0 has none."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text


def difference(row: Row) -> str:
    """`-4.8 (-6.8, -3.0)`; nothing where the row differs in no problem."""
    low, middle, high = (points(100 * row[name]) for name in ("low", "difference", "high"))
    return middle if low == middle == high else f"{middle} ({low}, {high})"
