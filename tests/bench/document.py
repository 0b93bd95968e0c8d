# SPDX-License-Identifier: Apache-2.0
"""Write the drawings and tables of docs/ from the recorded runs: `make bench-document`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.aims import FIGURES
from tests.bench.history import HISTORY, Curves, Entry, read
from tests.bench.nvme import GROUPS as NVME
from tests.bench.plot import drawing, series_of
from tests.bench.scale import GROUPS as SCALE
from tests.bench.snapshots import GROUPS as SNAPSHOTS

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, slots=True)
class Page:
    """A document, and the table and the drawing of the curves with these groups."""

    document: Path
    plot: Path | None
    groups: Sequence[str]
    table: str = "curves"

    def curves(self, entries: Sequence[Entry]) -> Curves:
        """Return the newest recorded ones; {} before the first."""
        found = ({grows: each for grows, each in entry.curves.items() if self._has(each)} for entry in entries[::-1])
        return next((curves for curves in found if curves), {})

    def _has(self, series: Mapping[str, object]) -> bool:
        return any(name.startswith(f"{group}: ") for group in self.groups for name in series)

    def drawn(self, entries: Sequence[Entry]) -> str:
        return drawing(self.curves(entries), self.groups)

    def written(self, entries: Sequence[Entry]) -> str:
        """Return the document with its generated parts written anew."""
        tables = {"figures": figures_tables(entries), self.table: curves_tables(self.curves(entries), self.groups)}
        return with_tables(self.document.read_text(), tables)


PAGES = (
    Page(DOCS / "performance.md", DOCS / "scale.svg", SCALE),
    Page(DOCS / "snapshots.md", DOCS / "snapshots.svg", SNAPSHOTS),
    *(Page(DOCS / "performance.md", None, groups, f"nvme-{part}") for part, groups in NVME.items()),
)


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


def curves_tables(curves: Curves, groups: Sequence[str]) -> str:
    """Return the tables behind the drawing."""
    lines: list[str] = []
    for grows, series in curves.items():
        counts = sorted({count for points in series.values() for count, _ in points})
        lines += [f"| {grows} | {' | '.join(f'{count:,}' for count in counts)} |", "|---|" + "---|" * len(counts)]
        for group in groups:
            for name, points in series_of(series, group).items():
                shown = {count: _shown(value) for count, value in points}
                lines.append(f"| {name}: {group} | {' | '.join(shown.get(count, '') for count in counts)} |")
        lines.append("")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    """Return about three digits."""
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """Return a document with those of these tables that it has written anew."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: make bench-document -->\n", f"<!-- end of {name} -->\n"
        before, found, after = text.partition(begin)
        if found:
            text = before + begin + "\n" + table.rstrip("\n") + "\n\n" + end + after.partition(end)[2]
    return text


def main() -> None:
    entries = read(HISTORY)
    for page in PAGES:
        if page.plot is not None:
            page.plot.write_text(page.drawn(entries))
        page.document.write_text(page.written(entries))


if __name__ == "__main__":
    main()
