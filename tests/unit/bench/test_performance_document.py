# SPDX-License-Identifier: Apache-2.0
"""The curves of a recorded run, drawn and as tables."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from tests.bench import document, plot
from tests.bench.history import HISTORY, Entry, Machine, read
from tests.bench.scale import GROUPS

CURVES = {
    grows: {f"{group}: {name}": [[10, 1.0], [1000, value]] for group in GROUPS for name, value in series.items()}
    for grows, series in {"volumes": {"a": 1.5, "b": 500.0}, "mounts": {"a": 1.2, "b": 2.0}}.items()
}


def elements(tag: str) -> list[ET.Element]:
    return list(ET.fromstring(plot.drawing(CURVES, GROUPS)).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_each_series_of_each_panel_is_a_line_with_its_points() -> None:
    assert len(elements("polyline")) == len(CURVES) * len(GROUPS) * 2
    assert len(elements("circle")) == len(CURVES) * len(GROUPS) * 2 * 2


def test_every_point_lies_in_the_drawing() -> None:
    _, _, width, height = map(float, ET.fromstring(plot.drawing(CURVES, GROUPS)).attrib["viewBox"].split())
    assert all(0 < float(each.attrib["cx"]) < width and 0 < float(each.attrib["cy"]) < height
               for each in elements("circle"))  # fmt: skip


def test_a_larger_value_is_drawn_higher() -> None:
    flat, steep = [each.attrib["points"].split() for each in elements("polyline")][:2]
    assert float(steep[1].split(",")[1]) < float(flat[1].split(",")[1]) < float(flat[0].split(",")[1])


def test_the_table_has_a_row_for_each_series_and_a_column_for_each_count() -> None:
    head, _, first, second, *_ = document.curves_tables(CURVES, GROUPS).splitlines()
    assert head == "| volumes | 10 | 1,000 |"
    assert [first, second] == [f"| a: {GROUPS[0]} | 1 | 1.5 |", f"| b: {GROUPS[0]} | 1 | 500 |"]


def test_a_table_for_each_kind_of_machine_compares_its_first_and_its_last_run() -> None:
    machine, other = Machine("cpu", 2, 24, "6.18", "ext4"), Machine("other", 2, 24, "6.18", "ext4")
    runs = [
        Entry(f"2026-01-0{day}T00:00Z", f"c{day}", False, "3.11", each, {"delete_ms": float(day)})
        for day, each in ((1, other), (2, machine), (3, machine), (4, machine))
    ]
    lines = [line for line in document.figures_tables(runs).splitlines() if line.startswith("| ")]
    assert lines == [
        "| figure | unit | aim | 2026-01-01, c1 | 2026-01-01, c1 |",
        "| DeleteVolume alone | ms | <= 6 | 1 | 1 |",
        "| figure | unit | aim | 2026-01-02, c2 | 2026-01-04, c4 |",
        "| DeleteVolume alone | ms | <= 6 | 2 | 4 |",
    ]


@pytest.mark.parametrize("page", document.PAGES, ids=lambda page: f"{page.document.name}-{page.table}")
def test_the_drawing_and_the_tables_are_those_of_the_history(page: document.Page) -> None:
    entries = read(HISTORY)
    assert page.plot is None or page.plot.read_text() == page.drawn(entries)
    assert page.document.read_text() == page.written(entries)
