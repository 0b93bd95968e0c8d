# SPDX-License-Identifier: Apache-2.0
"""Draw the recorded curves of the last run of `--only scale` as SVG and as tables: `make bench-plot`.

Each column is what grows, each row a group of series; both axes of a row of times are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.bench.history import HISTORY, Curves, latest_curves, read
from tests.bench.scale import GROUPS

ROOT = Path(__file__).parents[2]
PLOT, DOCUMENT = ROOT / "docs" / "scale.svg", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- curves: make bench-plot -->\n", "<!-- end of curves -->\n"

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 250, 170, 60, 30, 230
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")

Points = Sequence[Sequence[float]]


def drawing(curves: Curves) -> str:
    """Return the drawing of all curves."""
    width, height = LEFT + len(curves) * (WIDTH + LEFT) + LEGEND, len(GROUPS) * (HEIGHT + 2 * TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
            ' font-size="11">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, group in enumerate(GROUPS):
        names = list(_series(next(iter(curves.values())), group))
        values = [value for each in curves.values() for points in _series(each, group).values() for _, value in points]
        for column, (grows, series) in enumerate(curves.items()):
            x, y = LEFT + column * (WIDTH + LEFT), TOP + row * (HEIGHT + 2 * TOP)
            parts += _panel(x, y, f"{group}, by {grows}", _series(series, group), max(values), min(values))
        for number, name in enumerate(names):
            x, y = LEFT + len(curves) * (WIDTH + LEFT), TOP + row * (HEIGHT + 2 * TOP) + 10 + 15 * number
            parts.append(f'<text x="{x}" y="{y}" fill="{COLORS[number]}">&#9632; {name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _series(curves: Mapping[str, Points], group: str) -> dict[str, Points]:
    return {name.removeprefix(f"{group}: "): each for name, each in curves.items() if name.startswith(f"{group}: ")}


def _panel(x: int, y: int, title: str, series: Mapping[str, Points], most: float, least: float) -> Iterator[str]:
    """Yield one panel: logarithmic where values differ by more than tenfold, else from 0."""
    counts = [count for count, _ in next(iter(series.values()))]
    is_log = most > 10 * least
    ticks = [10.0**power for power in range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)]
    if not is_log:
        step = 10 ** math.floor(math.log10(most))
        ticks = [step * n for n in range(math.ceil(most / step) + 1)]

    def across(count: float) -> float:
        return x + WIDTH * math.log(count / counts[0]) / math.log(counts[-1] / counts[0])

    def up(value: float) -> float:
        part = math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0]) if is_log else value / ticks[-1]
        return y + HEIGHT * (1 - part)

    yield f'<text x="{x}" y="{y - 8}" font-weight="bold">{title}</text>'
    for tick in ticks:
        yield f'<path d="M{x} {up(tick):.1f}h{WIDTH}" stroke="#ddd"/>'
        yield f'<text x="{x - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:,g}</text>'
    for count in counts:
        yield f'<text x="{across(count):.1f}" y="{y + HEIGHT + 15}" text-anchor="middle">{count:,}</text>'
    for color, points in zip(COLORS, series.values(), strict=False):
        line = " ".join(f"{across(count):.1f},{up(value):.1f}" for count, value in points)
        yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>'
        for count, value in points:
            yield f'<circle cx="{across(count):.1f}" cy="{up(value):.1f}" r="2.5" fill="{color}"/>'


def tables(curves: Curves) -> str:
    """Return the tables behind the drawing."""
    lines: list[str] = []
    for grows, series in curves.items():
        counts = [count for count, _ in next(iter(series.values()))]
        lines += [f"| {grows} | {' | '.join(f'{count:,}' for count in counts)} |", "|---|" + "---|" * len(counts)]
        for group in GROUPS:
            for name, points in _series(series, group).items():
                lines.append(f"| {name}: {group} | {' | '.join(f'{value:.3g}' for _, value in points)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    entry = latest_curves(read(HISTORY))
    if entry is None:
        raise SystemExit(f"{HISTORY} has no curves: run make bench-record BENCH_ARGS='--only scale'")
    PLOT.write_text(drawing(entry.curves))
    before, after = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + tables(entry.curves) + END + after.split(END)[1])


if __name__ == "__main__":
    main()
