# SPDX-License-Identifier: Apache-2.0
"""Metrics as Prometheus reads them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from prometheus_client.parser import text_string_to_metric_families

from csi_driver.nvme_model import NvmeStates
from csi_driver.telemetry import metrics
from csi_driver.telemetry.metrics import ManagementMetrics, Metric, Reading, exposition

Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(*found: Metric) -> Found:
    """Return every sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition(found))
        for sample in family.samples
    }


def test_a_reading_is_read_on_each_scrape() -> None:
    values = iter((1, 2))
    reading = Reading("x_total", "X.", ("kind",), lambda: [(("a",), next(values))], is_counter=True)
    assert [parsed(reading) for _ in range(2)] == [{("x_total", (("kind", "a"),)): value} for value in (1, 2)]


def test_a_metric_without_samples_is_named() -> None:
    families = text_string_to_metric_families(exposition(metrics.node(dict, lambda: (0, 0), 4)))
    assert {family.name: len(family.samples) for family in families} == {
        "nvmesh_csi_node_volumes": 0,
        "nvmesh_csi_node_heavy_operations": 2,
        "nvmesh_csi_node_heavy_operations_limit": 1,
    }


def test_nvme_volumes_are_read_once_for_all_metrics() -> None:
    reads: list[NvmeStates] = [NvmeStates({"ready": 2, "fenced": 1}, {"live": 4, "missing": 1}, 7, 3, 5, 6)]
    assert parsed(metrics.NvmeMetrics(reads.pop)) == {
        ("nvmesh_csi_nvme_volumes", (("state", "ready"),)): 2,
        ("nvmesh_csi_nvme_volumes", (("state", "fenced"),)): 1,
        ("nvmesh_csi_nvme_paths", (("state", "live"),)): 4,
        ("nvmesh_csi_nvme_paths", (("state", "missing"),)): 1,
        ("nvmesh_csi_nvme_orphans", ()): 7,
        ("nvmesh_csi_nvme_reconnects_total", ()): 3,
        ("nvmesh_csi_nvme_failovers_total", ()): 5,
        ("nvmesh_csi_nvme_requeued_io_total", ()): 6,
    }


def test_durations_have_buckets_sum_and_count() -> None:
    durations = metrics.rpc_durations()
    durations.labels("s", "m", "OK").observe(0.03)
    found = parsed(durations)
    names = {name.removeprefix("nvmesh_csi_rpc_duration_seconds_") for name, _ in found}
    assert names == {"bucket", "sum", "count"}
    labels = (("code", "OK"), ("method", "m"), ("service", "s"))
    assert [
        found["nvmesh_csi_rpc_duration_seconds_bucket", tuple(sorted((*labels, ("le", le))))]
        for le in ("0.025", "0.05", "+Inf")
    ] == [0, 1, 1]


def test_concurrent_updates_are_counted() -> None:
    servers = ManagementMetrics()
    server = servers.begin("z", "s")
    ready = threading.Barrier(8)

    def count() -> None:
        ready.wait()
        for _ in range(500):
            server.asked("answered", 0.5)

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(count) for _ in range(8)]:
            each.result()
    found, labels = parsed(*servers.measurements()), (("server", "s"), ("zone", "z"))
    assert found["nvmesh_csi_management_requests_total", (("outcome", "answered"), *labels)] == 4000
    assert found["nvmesh_csi_management_request_duration_seconds_count", labels] == 4000


def test_the_process_has_the_standard_metrics() -> None:
    found = parsed(*metrics.process(version="1", role="node", driver_name="d"))
    assert {name for name, _ in found} == {
        "nvmesh_csi_build_info", "process_virtual_memory_bytes", "process_resident_memory_bytes",
        "process_start_time_seconds", "process_cpu_seconds_total", "process_max_fds", "process_open_fds",
        "process_threads",
    }  # fmt: skip


def test_open_files_are_counted() -> None:
    before = parsed(*metrics.process(version="", role="", driver_name=""))["process_open_fds", ()]
    descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(5)]
    try:
        after = parsed(*metrics.process(version="", role="", driver_name=""))["process_open_fds", ()]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert after - before == 5
