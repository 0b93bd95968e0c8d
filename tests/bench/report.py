# SPDX-License-Identifier: Apache-2.0
"""What a run prints, and the figures it has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.bench.aims import FIGURES, Comparison
from tests.bench.measure import Timing


@dataclass(frozen=True, slots=True)
class Table:
    """Prints rows as they are measured."""

    def row(self, name: str, *cells: object) -> None:
        shown = (f"{cell:>12.2f}" if isinstance(cell, float) else f"{cell!s:>12}" for cell in cells)
        print(f"{name:<52}  " + "  ".join(shown), flush=True)

    def timing(self, name: str, at_once: int, timing: Timing) -> None:
        self.row(name, at_once, timing.median_ms, timing.percentile_ms(99), timing.per_second)


@dataclass(slots=True)
class Report:
    """Collects the figures that `FIGURES` names, and curves: by what grows, the points of each series."""

    figures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)

    def table(self, title: str, columns: Sequence[str]) -> Table:
        head, *others = columns
        print(f"\n{title}\n{head:<52}  " + "  ".join(f"{column:>12}" for column in others))
        return Table()

    def figure(self, key: str, value: float) -> None:
        if key not in FIGURES:
            raise KeyError(key)
        self.figures[key] = value

    def point(self, grows: str, series: str, count: int, value: float) -> None:
        self.curves.setdefault(grows, {}).setdefault(series, []).append([count, round(value, 3)])


def print_comparison(comparisons: Sequence[Comparison]) -> bool:
    """Print figures beside their aims and the last recorded run; return whether one is worse than recorded."""
    table = Report().table("Figures and aims", ("figure", "unit", "now", "aim", "met", "recorded", "change"))
    for each in comparisons:
        figure, expected = each.figure, each.expected
        met = {True: "yes", False: "no", None: "-"}[figure.is_met(each.value)]
        change = f"{each.value / expected - 1:+.0%}" if expected else "-"
        aim: object = "-" if figure.aim is None else figure.aim
        recorded: object = "-" if expected is None else expected
        table.row(figure.name, figure.unit, each.value, aim, met, recorded, change)
    worse = [each.figure.name for each in comparisons if each.is_worse]
    for name in worse:
        print(f"worse than recorded by 20 % or more: {name}")
    if any(each.expected is not None for each in comparisons):
        print("Recorded times and rates are scaled by the script's pace in both runs.")
    return bool(worse)
