# SPDX-License-Identifier: Apache-2.0
"""The curves of a recorded run, drawn and as tables."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from tests.bench import plot
from tests.bench.scale import GROUPS

CURVES = {
    grows: {f"{group}: {name}": [[10, 1.0], [1000, value]] for group in GROUPS for name, value in series.items()}
    for grows, series in {"volumes": {"a": 1.5, "b": 500.0}, "mounts": {"a": 1.2, "b": 2.0}}.items()
}


def elements(tag: str) -> list[ET.Element]:
    return list(ET.fromstring(plot.drawing(CURVES)).iter(f"{{http://www.w3.org/2000/svg}}{tag}"))


def test_each_series_of_each_panel_is_a_line_with_its_points() -> None:
    assert len(elements("polyline")) == len(CURVES) * len(GROUPS) * 2
    assert len(elements("circle")) == len(CURVES) * len(GROUPS) * 2 * 2


def test_every_point_lies_in_the_drawing() -> None:
    _, _, width, height = map(float, ET.fromstring(plot.drawing(CURVES)).attrib["viewBox"].split())
    assert all(0 < float(each.attrib["cx"]) < width and 0 < float(each.attrib["cy"]) < height
               for each in elements("circle"))  # fmt: skip


def test_a_larger_value_is_drawn_higher() -> None:
    flat, steep = [each.attrib["points"].split() for each in elements("polyline")][:2]
    assert float(steep[1].split(",")[1]) < float(flat[1].split(",")[1]) < float(flat[0].split(",")[1])


def test_the_table_has_a_row_for_each_series_and_a_column_for_each_count() -> None:
    head, _, first, second, *_ = plot.tables(CURVES).splitlines()
    assert head == "| volumes | 10 | 1,000 |"
    assert [first, second] == [f"| a: {GROUPS[0]} | 1 | 1.5 |", f"| b: {GROUPS[0]} | 1 | 500 |"]
