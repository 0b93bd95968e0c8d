# SPDX-License-Identifier: Apache-2.0
"""Write docs/scale.svg and the tables of docs/performance.md from the recorded runs: `make bench-document`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.bench.aims import FIGURES
from tests.bench.history import HISTORY, Curves, Entry, read
from tests.bench.plot import drawing, series_of
from tests.bench.scale import GROUPS

DOCS = Path(__file__).parents[2] / "docs"
PLOT, DOCUMENT = DOCS / "scale.svg", DOCS / "performance.md"


def figures_tables(entries: Sequence[Entry]) -> str:
    """Return for each kind of machine the aims with the figures of its first and its last recorded run."""
    lines: list[str] = []
    measured = [entry for entry in entries if entry.figures]
    for number, last in enumerate(measured):
        if any(later.machine.is_like(last.machine) for later in measured[number + 1 :]):
            continue
        first = next(entry for entry in measured if entry.machine.is_like(last.machine))
        lines += [
            f"{last.machine}; Python {last.python}.",
            "",
            f"| figure | unit | aim | {first.date[:10]}, {first.commit[:7]} | {last.date[:10]}, {last.commit[:7]} |",
            "|---|---|---|---|---|",
        ]
        for key, figure in FIGURES.items():
            if key in last.figures:
                sign = ">=" if figure.more_is_better else "<="
                aim = "" if figure.aim is None else f"{sign} {figure.aim:g}"
                cells = [figure.name, figure.unit, aim, _shown(first.figures.get(key)), _shown(last.figures[key])]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def curves_tables(curves: Curves) -> str:
    """Return the tables behind the drawing."""
    lines: list[str] = []
    for grows, series in curves.items():
        counts = [count for count, _ in next(iter(series.values()))]
        lines += [f"| {grows} | {' | '.join(f'{count:,}' for count in counts)} |", "|---|" + "---|" * len(counts)]
        for group in GROUPS:
            for name, points in series_of(series, group).items():
                lines.append(f"| {name}: {group} | {' | '.join(_shown(value) for _, value in points)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    """Return about three digits."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def with_tables(text: str, entries: Sequence[Entry]) -> str:
    """Return the document with its generated parts written anew."""
    curves = next(entry.curves for entry in reversed(entries) if entry.curves)
    for name, table in (("figures", figures_tables(entries)), ("curves", curves_tables(curves))):
        begin, end = f"<!-- {name}: make bench-document -->\n", f"<!-- end of {name} -->\n"
        before, _, after = text.partition(begin)
        text = before + begin + "\n" + table.rstrip("\n") + "\n\n" + end + after.partition(end)[2]
    return text


def main() -> None:
    entries = read(HISTORY)
    PLOT.write_text(drawing(next(entry.curves for entry in reversed(entries) if entry.curves)))
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), entries))


if __name__ == "__main__":
    main()
