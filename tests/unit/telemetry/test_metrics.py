"""Measurements as Prometheus reads them: checked by its own client library's parser, which the driver does not use."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.host import processes
from csi_driver.telemetry import measured, metrics
from csi_driver.telemetry.metrics import Counter, Description, Histogram, Kind, Measurement, Reading, exposition

parser = pytest.importorskip("prometheus_client.parser", reason="run: make .venv/test")

Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(*measurements: Measurement) -> Found:
    """Return every sample by its name and labels, as the parser understands it."""
    families = parser.text_string_to_metric_families(exposition(measurements))
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def counter(*labels: str) -> Counter:
    return Counter(Description("things_total", "Things.", labels))


def histogram(*bounds: float) -> Histogram:
    return Histogram(Description("wait_seconds", "Waiting.", ("what",)), bounds)


def test_a_counter_counts_by_its_labels() -> None:
    things = counter("kind")
    things.add("a")
    things.add("a")
    things.add("b", amount=2.5)
    things.add("c", amount=0)
    assert parsed(things) == {
        ("things_total", (("kind", "a"),)): 2, ("things_total", (("kind", "b"),)): 2.5,
        ("things_total", (("kind", "c"),)): 0,
    }  # fmt: skip


@pytest.mark.parametrize("text", ['a"b', "a\\b", "a\nb", "ä€", "", "{}=,", "\\n", '\\"'])
def test_labels_and_meanings_of_any_text_arrive_as_they_are(text: str) -> None:
    things = Counter(Description("things_total", f"Things: {text}.", ("kind",)))
    things.add(text)
    (family,) = parser.text_string_to_metric_families(exposition([things]))
    assert [sample.labels for sample in family.samples] == [{"kind": text}]
    assert family.documentation == f"Things: {text}."


@pytest.mark.parametrize("value", [0, 1, -1, 0.1, 1e-9, 1e300, 123456789012345, float(1 << 60), 2.0])
def test_numbers_arrive_exactly(value: float) -> None:
    assert parsed(Reading(Description("x", "X."), lambda: [((), value)])) == {("x", ()): value}


def test_a_histogram_puts_each_value_where_it_belongs() -> None:
    waits = histogram(0.1, 1, 10)
    for value in (0.05, 0.1, 0.5, 10, 11, 1000):
        waits.observe(value, "x")
    found = parsed(waits)
    buckets = [found["wait_seconds_bucket", (("le", le), ("what", "x"))] for le in ("0.1", "1", "10", "+Inf")]
    assert buckets == [2, 3, 4, 6]
    assert found["wait_seconds_count", (("what", "x"),)] == 6
    assert found["wait_seconds_sum", (("what", "x"),)] == pytest.approx(1021.65)


def test_what_has_no_series_yet_is_named_all_the_same() -> None:
    families = list(parser.text_string_to_metric_families(exposition([counter("kind"), histogram(1)])))
    assert [(family.type, len(family.samples)) for family in families] == [("counter", 0), ("histogram", 0)]


def test_what_is_looked_up_is_looked_up_each_time() -> None:
    values = iter((1, 2))
    reading = Reading(Description("x_total", "X."), lambda: [((), next(values))], Kind.COUNTER)
    assert [list(parsed(reading).values()) for _ in range(2)] == [[1], [2]]


def test_strange_labels_cannot_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MOST_SERIES", 3)
    things, waits = counter("kind"), histogram(1)
    for number in range(100):
        things.add(str(number))
        waits.observe(1, str(number))
    assert len(parsed(things)) == 4
    assert parsed(things)["things_total", (("kind", metrics.OTHER),)] == 97
    assert parsed(waits)["wait_seconds_count", (("what", metrics.OTHER),)] == 97


def test_nothing_is_lost_between_threads() -> None:
    things, waits = counter(), histogram(1)
    ready = threading.Barrier(8)

    def count() -> None:
        ready.wait()
        for _ in range(2000):
            things.add()
            waits.observe(0.5, "x")

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(count) for _ in range(8)]:
            each.result()
    assert parsed(things) == {("things_total", ()): 16000}
    assert parsed(waits)["wait_seconds_count", (("what", "x"),)] == 16000


# --- this process -----------------------------------------------------------------------------------------------


def test_the_figures_of_the_process_are_the_kernels() -> None:
    before_s = time.process_time()
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    try:
        own = processes.figures()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert own.open_fds - processes.figures().open_fds == 5
    assert before_s - 0.1 <= own.cpu_s <= time.process_time() + 0.1
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert own.threads == int(status["Threads"])
    assert own.resident_bytes == pytest.approx(int(status["VmRSS"].split()[0]) << 10, rel=0.2)
    assert own.virtual_bytes == pytest.approx(int(status["VmSize"].split()[0]) << 10, rel=0.2)
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert own.started_at_s <= time.time()
    assert own.started_at_s >= time.time() - uptime_s - 5


def test_the_names_of_the_process_are_those_that_prometheus_wants() -> None:
    from prometheus_client import ProcessCollector
    from prometheus_client.registry import CollectorRegistry

    wanted = {metric.name for metric in ProcessCollector(registry=CollectorRegistry()).collect()}
    ours = {each.description.name.removesuffix("_total") for each in measured.process(processes.figures)}
    assert wanted <= ours
