# SPDX-License-Identifier: Apache-2.0
"""Metrics of the driver. docs/metrics.md explains each one, and a test compares the two.

`prometheus_client` stores and writes them; its default registry, with metrics of the interpreter, is not used. Labels
have few values (methods, codes, servers), never names of volumes, nodes or paths.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import prometheus_client as client
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from csi_driver.background import Background
    from csi_driver.nvme_model import ExportCounts, NvmeStates

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Metric: TypeAlias = Collector
Sample = tuple[tuple[str, ...], float]
"""Values of the labels, and the value."""

_CALL = ("service", "method")
_SERVER = ("zone", "server")
_CALL_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_REQUEST_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class Reading(Collector):
    """A gauge or counter. Its samples are read on each scrape; `read` must return soon."""

    name: str
    help: str
    labels: tuple[str, ...]
    read: Callable[[], Iterable[Sample]]
    is_counter: bool = False

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        family = (CounterMetricFamily if self.is_counter else GaugeMetricFamily)(
            self.name, self.help, labels=self.labels
        )
        for labels, value in self.read():
            family.add_metric(labels, value)
        yield family


def exposition(metrics: Iterable[Metric]) -> str:
    client.disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series
    registry = client.CollectorRegistry()
    for metric in metrics:
        registry.register(metric)
    return client.generate_latest(registry).decode()


def _gauge(name: str, text: str, read: Callable[[], float]) -> Metric:
    return Reading(name, text, (), lambda: [((), read())])


def _by(label: str, read: Callable[[], Mapping[str, float]]) -> tuple[tuple[str, ...], Callable[[], list[Sample]]]:
    return (label,), lambda: [((key,), value) for key, value in sorted(read().items())]


def process(*, version: str, role: str, driver_name: str) -> list[Metric]:
    labels = {
        "version": version,
        "role": role,
        "driver_name": driver_name,
        "python_version": sys.version.split()[0],
    }
    build = Reading(
        "nvmesh_csi_build_info",
        "Always 1; the labels name the program.",
        tuple(labels),
        lambda: [(tuple(labels.values()), 1)],
    )
    threads = _gauge("process_threads", "Threads that run Python code.", threading.active_count)
    return [build, client.ProcessCollector(registry=None), threads]


def background(loops: Sequence[Background]) -> list[Metric]:
    return [
        Reading(
            "nvmesh_csi_background_failures_total",
            "Runs of background work that raised an error.",
            *_by("work", lambda: {loop.name: loop.failures for loop in loops}),
            is_counter=True,
        ),
        Reading(
            "nvmesh_csi_background_stalled_seconds",
            "Time since background work began to fail, or since its present run began; 0 when idle.",
            *_by("work", lambda: {loop.name: loop.stalled_s() for loop in loops}),
        ),
    ]


def rpc_durations() -> Histogram:
    return Histogram(
        "nvmesh_csi_rpc_duration_seconds",
        "Duration of CSI calls, by the code of the response.",
        (*_CALL, "code"),
        buckets=_CALL_BOUNDS_S,
        registry=None,
    )


def running_calls(read: Callable[[], Mapping[tuple[str, str], tuple[int, float]]]) -> list[Metric]:
    return [
        Reading(
            "nvmesh_csi_rpc_in_flight",
            "CSI calls that are being executed.",
            _CALL,
            lambda: [(call, count) for call, (count, _) in sorted(read().items())],
        ),
        Reading(
            "nvmesh_csi_operation_age_seconds",
            "Age of the oldest CSI call that is being executed, whether or not its caller still waits.",
            _CALL,
            lambda: [(call, age_s) for call, (_, age_s) in sorted(read().items())],
        ),
    ]


def node(
    volumes: Callable[[], Mapping[str, int]], heavy: Callable[[], tuple[int, int]], heavy_limit: int
) -> list[Metric]:
    return [
        Reading(
            "nvmesh_csi_node_volumes",
            "Volumes of this driver on the node by state: staged (filesystems), published, or mounted elsewhere.",
            *_by("state", volumes),
        ),
        Reading(
            "nvmesh_csi_node_heavy_operations",
            "Formatting, checking, growing and opening of volumes: running, or waiting for a slot.",
            *_by("state", lambda: dict(zip(("running", "waiting"), heavy(), strict=True))),
        ),
        _gauge(
            "nvmesh_csi_node_heavy_operations_limit",
            "Heavy operations that may run at the same time.",
            lambda: heavy_limit,
        ),
    ]


@dataclass(frozen=True, slots=True)
class NvmeMetrics(Collector):
    """Volumes that the node connects by NVMe/TCP: all families of one reading."""

    read: Callable[[], NvmeStates]

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        now = self.read()
        text = "Volumes connected by NVMe/TCP: ready, no_path (I/O waits), fenced."
        volumes = GaugeMetricFamily("nvmesh_csi_nvme_volumes", text, labels=("state",))
        text = "Paths to these volumes by the kernel's state; missing: not connected."
        paths = GaugeMetricFamily("nvmesh_csi_nvme_paths", text, labels=("state",))
        for family, values in ((volumes, now.volumes), (paths, now.paths)):
            for state, number in sorted(values.items()):
                family.add_metric((state,), number)
            yield family
        text = "Connections of this driver that belong to no volume in use."
        yield GaugeMetricFamily("nvmesh_csi_nvme_orphans", text, now.orphans)
        text = "Lost paths that the driver connected again."
        yield CounterMetricFamily("nvmesh_csi_nvme_reconnects_total", text, now.reconnects)
        text = "Requests that the kernel sent again by another path (Linux 7.0)."
        yield CounterMetricFamily("nvmesh_csi_nvme_failovers_total", text, now.failovers)
        text = "Requests that waited because no path was usable (Linux 7.0)."
        yield CounterMetricFamily("nvmesh_csi_nvme_requeued_io_total", text, now.requeued_io)


def registration(is_registered: Callable[[], bool], results: Callable[[], Mapping[str, int]]) -> list[Metric]:
    return [
        _gauge("nvmesh_csi_kubelet_registered", "1: kubelet has registered the driver.", is_registered),
        Reading(
            "nvmesh_csi_kubelet_verdicts_total",
            "Registrations that kubelet accepted or refused.",
            *_by("verdict", results),
            is_counter=True,
        ),
    ]


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """Metrics of one management server, for one client of it."""

    of_all: ManagementMetrics
    labels: tuple[str, str]

    def asked(self, outcome: str, took_s: float) -> None:
        self.of_all.requests.labels(*self.labels, outcome).inc()
        self.of_all.durations.labels(*self.labels).observe(took_s)

    def logged_in(self) -> None:
        self.of_all.logins.labels(*self.labels).inc()

    def failed(self) -> None:
        self.of_all.failures.labels(*self.labels).inc()

    def works(self, does: bool) -> None:
        """Record whether the server worked; ignored for one that has no client any more."""
        with self.of_all.lock:
            if self.labels in self.of_all.up:
                self.of_all.up[self.labels] = does

    def end(self) -> None:
        with self.of_all.lock:
            self.of_all.clients[self.labels] -= 1
            if not self.of_all.clients[self.labels]:
                del self.of_all.clients[self.labels], self.of_all.up[self.labels]


class ManagementMetrics:
    """Metrics of the management servers of all zones. `server` is a URL, without credentials."""

    def __init__(self) -> None:
        self.requests = Counter(
            "nvmesh_csi_management_requests_total",
            "Requests to management servers: answered, refused (login or version), unreachable (not executed),"
            " unknown (perhaps executed), failed (no time left, or unreadable credentials).",
            (*_SERVER, "outcome"),
            registry=None,
        )
        self.durations = Histogram(
            "nvmesh_csi_management_request_duration_seconds",
            "Duration of requests to management servers, logins included.",
            _SERVER,
            buckets=_REQUEST_BOUNDS_S,
            registry=None,
        )
        self.logins = Counter(
            "nvmesh_csi_management_logins_total", "Sessions opened on management servers.", _SERVER, registry=None
        )
        self.failures = Counter(
            "nvmesh_csi_management_server_failures_total",
            "Failures of a management server after which other servers were used.",
            _SERVER,
            registry=None,
        )
        self.up: dict[tuple[str, str], bool] = {}
        self.clients: dict[tuple[str, str], int] = {}
        """Clients of each server: two for a moment while credentials change."""
        self.lock = threading.Lock()

    def begin(self, zone: str, server: str) -> ServerMetrics:
        """Add a client of this server, which counts as working until a request fails."""
        labels = zone, server
        with self.lock:
            self.clients[labels] = self.clients.get(labels, 0) + 1
            self.up.setdefault(labels, True)
        for counter in (self.logins, self.failures):
            counter.labels(*labels)  # makes a series with the value 0
        return ServerMetrics(self, labels)

    def _states(self) -> list[Sample]:
        with self.lock:
            return [(labels, int(works)) for labels, works in sorted(self.up.items())]

    def measurements(self) -> list[Metric]:
        up = Reading(
            "nvmesh_csi_management_server_up",
            "1: the management server worked when it was last used.",
            _SERVER,
            self._states,
        )
        return [self.requests, self.durations, self.logins, self.failures, up]


def storage(
    pool: Callable[[], Mapping[str, int]], volumes: Callable[[], int], attachments: Callable[[], int]
) -> list[Metric]:
    return [
        Reading(
            "nvmesh_csi_storage_pool_bytes",
            "The pool: capacity, promised (to volumes), shared (kept free for writes to blocks that snapshots share),"
            " available (in its filesystem), allocatable (to new volumes).",
            *_by("state", pool),
        ),
        _gauge("nvmesh_csi_storage_volumes", "Volumes in the pool.", volumes),
        _gauge("nvmesh_csi_storage_attachments", "Attachments of all clients.", attachments),
    ]


def exports(read: Callable[[], ExportCounts]) -> list[Metric]:
    states = _by("state", lambda: {"exported": (found := read()).exported, "waiting": found.waiting})
    return [
        Reading(
            "nvmesh_csi_storage_exports",
            "Attachments of nodes: exported over NVMe/TCP, or waiting (not exported yet, or it failed).",
            *states,
        ),
        _gauge(
            "nvmesh_csi_storage_export_connections",
            "TCP connections of nodes to their exports.",
            lambda: read().connections,
        ),
        _gauge(
            "nvmesh_csi_storage_export_ports_free",
            "Ports left for new attachments of nodes.",
            lambda: read().ports_free,
        ),
    ]


class Cuts:
    """Cuts and copies of volumes since the start."""

    def __init__(self, results: Iterable[str]) -> None:
        self.results = Counter(
            "nvmesh_csi_storage_snapshot_cuts_total",
            "Requests to cut or copy volumes: done, or refused: busy, extents (too many), space, unsupported.",
            ("result",),
            registry=None,
        )
        for result in results:
            self.results.labels(result)  # makes a series with the value 0
        self.last_extents = Gauge(
            "nvmesh_csi_storage_last_cut_extents", "Extents of the file that was cut last.", registry=None
        )
        self.last_s = Gauge("nvmesh_csi_storage_last_cut_seconds", "Time of the last cut.", registry=None)

    def measurements(self, snapshots: Callable[[], int]) -> list[Metric]:
        count = _gauge("nvmesh_csi_storage_snapshots", "Snapshots in the pool.", snapshots)
        return [count, self.results, self.last_extents, self.last_s]
