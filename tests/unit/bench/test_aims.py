# SPDX-License-Identifier: Apache-2.0
"""Which figures of a benchmark reach their aim, and which are worse than recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.aims import FIGURES, PACE, compare
from tests.bench.history import Entry, Machine, append, latest_figures, read

MACHINE = Machine("cpu", 2, 24, "6.18", "ext4")


def worse(now: dict[str, float], before: dict[str, float]) -> list[str]:
    names = {figure.name: key for key, figure in FIGURES.items()}
    return [names[each.figure.name] for each in compare(now, before) if each.is_worse]


def entry(machine: Machine = MACHINE, **figures: float) -> Entry:
    return Entry("2026-01-01T00:00Z", "abc", False, "3.11", machine, figures)


@pytest.mark.parametrize(("key", "value", "met"), [
    ("life_ratio", 1.1, True), ("life_ratio", 1.11, False),
    ("attach_rate_100", 200.0, True), ("attach_rate_100", 199.0, False),
    ("create_rate_16", 5.0, None),
])  # fmt: skip
def test_an_aim_is_met_from_its_value_on(key: str, value: float, met: bool | None) -> None:
    assert FIGURES[key].is_met(value) is met


@pytest.mark.parametrize(("key", "before", "now"), [
    ("life_ratio", 1.0, 1.21), ("life_rate_ratio_16", 1.0, 0.79), ("stage_cpu_ms", 4.0, 4.9),
])  # fmt: skip
def test_a_figure_that_is_a_fifth_worse_is_named(key: str, before: float, now: float) -> None:
    assert worse({key: now}, {key: before}) == [key]


@pytest.mark.parametrize(("key", "before", "now"), [
    ("life_ratio", 1.0, 1.19), ("life_ratio", 1.0, 0.5), ("life_rate_ratio_16", 1.0, 0.81),
    ("life_rate_ratio_16", 1.0, 2.0),
])  # fmt: skip
def test_a_figure_that_is_better_or_a_little_worse_is_not_named(key: str, before: float, now: float) -> None:
    assert worse({key: now}, {key: before}) == []


def test_a_difference_below_the_grain_is_noise() -> None:
    assert worse({"node_threads": 6.0}, {"node_threads": 3.0}) == []
    assert worse({"node_threads": 8.0}, {"node_threads": 3.0}) == ["node_threads"]


def test_a_slower_machine_does_not_make_a_time_or_a_rate_worse() -> None:
    before = {PACE: 10.0, "delete_ms": 6.0, "attach_rate_100": 200.0}
    assert worse({PACE: 20.0, "delete_ms": 12.0, "attach_rate_100": 100.0}, before) == []


def test_a_time_that_grows_more_than_the_machine_slows_is_worse() -> None:
    before = {PACE: 10.0, "delete_ms": 6.0, "attach_rate_100": 200.0}
    assert worse({PACE: 20.0, "delete_ms": 15.0, "attach_rate_100": 70.0}, before) == ["attach_rate_100", "delete_ms"]


def test_times_are_not_compared_without_the_pace_of_both_runs() -> None:
    before = {"delete_ms": 1.0, "life_ratio": 1.0}
    assert worse({PACE: 10.0, "delete_ms": 99.0, "life_ratio": 9.0}, before) == ["life_ratio"]


def test_the_pace_itself_is_never_worse() -> None:
    assert worse({PACE: 99.0}, {PACE: 1.0}) == []


def test_only_what_was_measured_is_compared() -> None:
    (only,) = compare({"delete_ms": 1.0}, {"life_ratio": 1.0})
    assert (only.figure, only.expected) == (FIGURES["delete_ms"], None)


def test_recorded_runs_are_read_as_they_were_written(tmp_path: Path) -> None:
    first = entry(delete_ms=6.0)
    second = Entry("2026-01-02T00:00Z", "def", True, "3.12", MACHINE, {}, {"volumes": {"start": [[10, 0.5]]}})
    for each in (first, second):
        append(tmp_path / "history", each)
    assert read(tmp_path / "history") == [first, second]


def test_without_a_history_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    assert latest_figures(read(tmp_path / "absent"), MACHINE) == {}


def test_the_newest_run_on_a_like_machine_counts() -> None:
    other = Machine("other cpu", 2, 24, "6.18", "ext4")
    newer_kernel = Machine("cpu", 2, 32, "7.0", "ext4")
    runs = [entry(delete_ms=1.0), entry(newer_kernel, delete_ms=2.0), entry(other, delete_ms=3.0), entry()]
    assert latest_figures(runs, MACHINE) == {"delete_ms": 2.0}
