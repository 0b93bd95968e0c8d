# SPDX-License-Identifier: Apache-2.0
"""Draw the curves of a run as SVG.

Each column is what grows, each row a group of series; both axes of a row of times are logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from tests.bench.history import Curves

WIDTH, HEIGHT, LEFT, TOP, LEGEND = 250, 170, 60, 30, 230
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")

Points = Sequence[Sequence[float]]


def drawing(curves: Curves, groups: Sequence[str]) -> str:
    """Return the drawing of all curves, a row for each of the groups that the series belong to."""
    width, height = LEFT + len(curves) * (WIDTH + LEFT) + LEGEND, len(groups) * (HEIGHT + 2 * TOP)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
            ' font-size="11">'
        ),
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for row, group in enumerate(groups):
        names = list(series_of(next(iter(curves.values())), group))
        values = [
            value for each in curves.values() for points in series_of(each, group).values() for _, value in points
        ]
        for column, (grows, series) in enumerate(curves.items()):
            x, y = LEFT + column * (WIDTH + LEFT), TOP + row * (HEIGHT + 2 * TOP)
            if shown := series_of(series, group):
                parts += _panel(x, y, (group, grows), shown, max(values), min(values))
        for number, name in enumerate(names):
            x, y = LEFT + len(curves) * (WIDTH + LEFT), TOP + row * (HEIGHT + 2 * TOP) + 10 + 15 * number
            parts.append(f'<text x="{x}" y="{y}" fill="{COLORS[number]}">&#9632; {name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def series_of(curves: Mapping[str, Points], group: str) -> dict[str, Points]:
    return {name.removeprefix(f"{group}: "): each for name, each in curves.items() if name.startswith(f"{group}: ")}


def _panel(
    x: int, y: int, titles: tuple[str, str], series: Mapping[str, Points], most: float, least: float
) -> Iterator[str]:
    """Yield one panel, titled with both axes: logarithmic where values differ by more than tenfold, else from 0."""
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

    yield f'<text x="{x}" y="{y - 8}" font-weight="bold">{titles[0]}</text>'
    yield f'<text x="{x + WIDTH / 2}" y="{y + HEIGHT + 30}" text-anchor="middle">{titles[1]}</text>'
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
