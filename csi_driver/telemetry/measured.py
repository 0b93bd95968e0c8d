"""What is measured, by name: docs/metrics.md explains each, and a test holds the two together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.background import Background
from csi_driver.telemetry.metrics import Counter, Description, Histogram, Kind, Measurement, Reading, Sample

_CALL = ("service", "method")
_SERVER = ("server",)

_CALL_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_REQUEST_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

_DURATION = Description(
    "nvmesh_csi_rpc_duration_seconds",
    "Time that CSI calls took, by the code of their answer.",
    (*_CALL, "code"),
)
_IN_FLIGHT = Description("nvmesh_csi_rpc_in_flight", "CSI calls that are being carried out.", _CALL)
_AGE = Description(
    "nvmesh_csi_operation_age_seconds",
    "Age of the oldest CSI call that is still being carried out, whether or not its caller still waits.",
    _CALL,
)


def rpc_durations() -> Histogram:
    """Return what the RPC boundary fills."""
    return Histogram(_DURATION, _CALL_BOUNDS_S)


def work_under_way(read: Callable[[], Mapping[tuple[str, str], tuple[int, float]]]) -> list[Measurement]:
    """Measure what runs: `read` gives, by service and method, how many calls do and the seconds of the oldest."""
    return [
        Reading(_IN_FLIGHT, lambda: [(call, count) for call, (count, _) in sorted(read().items())]),
        Reading(_AGE, lambda: [(call, age_s) for call, (_, age_s) in sorted(read().items())]),
    ]


@dataclass(frozen=True, slots=True)
class ManagementMetrics:
    """What a management client tells of its servers, which stand under their URLs, without credentials."""

    requests: Counter = field(
        default_factory=lambda: Counter(
            Description(
                "nvmesh_csi_management_requests_total",
                "Requests to management servers: answered, refused (login or version), unreachable (certainly not"
                " carried out), unknown (perhaps carried out), failed (no time left, or an unreadable login).",
                (*_SERVER, "outcome"),
            )
        )
    )
    durations: Histogram = field(
        default_factory=lambda: Histogram(
            Description(
                "nvmesh_csi_management_request_duration_seconds",
                "Time that requests to management servers took, logins included, whatever came of them.",
                _SERVER,
            ),
            _REQUEST_BOUNDS_S,
        )
    )
    logins: Counter = field(
        default_factory=lambda: Counter(
            Description("nvmesh_csi_management_logins_total", "Sessions opened on management servers.", _SERVER)
        )
    )
    failures: Counter = field(
        default_factory=lambda: Counter(
            Description(
                "nvmesh_csi_management_server_failures_total",
                "Times that a management server failed, so that other servers were used instead.",
                _SERVER,
            )
        )
    )
    _up: dict[str, bool] = field(default_factory=dict)
    _users: dict[str, int] = field(default_factory=dict)
    """Clients of each server: while credentials change there are two for a moment."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, server: str, outcome: str, took_s: float) -> None:
        """Note what became of a request."""
        self.requests.add(server, outcome)
        self.durations.observe(took_s, server)

    def begin(self, server: str) -> None:
        """Note that a client has this server; one that was never asked counts as working."""
        with self._lock:
            self._users[server] = self._users.get(server, 0) + 1
            self._up.setdefault(server, True)
        for counter in (self.logins, self.failures):
            counter.add(server, amount=0)

    def works(self, server: str, does: bool) -> None:
        """Note whether a server worked when it was asked; of one that no client has any more, nothing."""
        with self._lock:
            if server in self._up:
                self._up[server] = does

    def end(self, server: str) -> None:
        """Note that a client has this server no more."""
        with self._lock:
            self._users[server] -= 1
            if not self._users[server]:
                del self._users[server], self._up[server]

    def _states(self) -> list[Sample]:
        with self._lock:
            return [((server,), int(works)) for server, works in sorted(self._up.items())]

    def measurements(self) -> list[Measurement]:
        """Return all of it."""
        description = Description(
            "nvmesh_csi_management_server_up", "1: the management server worked when it was last asked.", _SERVER
        )
        return [self.requests, self.durations, self.logins, self.failures, Reading(description, self._states)]


def node(
    volumes: Callable[[], Mapping[str, int]], heavy: Callable[[], tuple[int, int]], heavy_places: int
) -> list[Measurement]:
    """Measure a node: `volumes` gives their number by state, `heavy` how many operations run and how many wait."""

    def operations() -> list[Sample]:
        running, waiting = heavy()
        return [(("running",), running), (("waiting",), waiting)]

    return [
        Reading(
            Description(
                "nvmesh_csi_node_volumes",
                "Volumes of this driver on the node by state: staged (filesystems), published, or mounted elsewhere.",
                ("state",),
            ),
            lambda: [((state,), count) for state, count in volumes().items()],
        ),
        Reading(
            Description(
                "nvmesh_csi_node_heavy_operations",
                "Formatting, checking, growing and opening of volumes: running, or waiting for a place.",
                ("state",),
            ),
            operations,
        ),
        Reading(
            Description("nvmesh_csi_node_heavy_operations_limit", "Heavy operations that may run at the same time."),
            lambda: [((), heavy_places)],
        ),
    ]


def registration(is_registered: Callable[[], bool], verdicts: Callable[[], Mapping[str, int]]) -> list[Measurement]:
    """Measure the registration with kubelet: whether it stands, and how often kubelet said what."""
    return [
        Reading(
            Description("nvmesh_csi_kubelet_registered", "1: kubelet has registered the driver."),
            lambda: [((), int(is_registered()))],
        ),
        Reading(
            Description(
                "nvmesh_csi_kubelet_verdicts_total", "Registrations that kubelet accepted or refused.", ("verdict",)
            ),
            lambda: [((verdict,), count) for verdict, count in verdicts().items()],
            Kind.COUNTER,
        ),
    ]


def background(loops: Sequence[Background]) -> list[Measurement]:
    """Measure the background threads: their failures, and for how long each has failed or been stuck."""
    return [
        Reading(
            Description(
                "nvmesh_csi_background_failures_total", "Runs of background work that raised an error.", ("work",)
            ),
            lambda: [((loop.name,), loop.failures) for loop in loops],
            Kind.COUNTER,
        ),
        Reading(
            Description(
                "nvmesh_csi_background_stalled_seconds",
                "Time since background work began to fail, or since its present run began; 0 when idle.",
                ("work",),
            ),
            lambda: [((loop.name,), loop.stalled_s()) for loop in loops],
        ),
    ]


def storage(
    pool: Callable[[], Mapping[str, int]], volumes: Callable[[], int], attachments: Callable[[], int]
) -> list[Measurement]:
    """Measure the embedded storage manager: `pool` gives bytes by what they are."""
    return [
        Reading(
            Description(
                "nvmesh_csi_storage_pool_bytes",
                "The pool: capacity, promised (to volumes and groups), available (to the manager in its file system).",
                ("state",),
            ),
            lambda: [((state,), count) for state, count in pool().items()],
        ),
        Reading(Description("nvmesh_csi_storage_volumes", "Volumes in the pool."), lambda: [((), volumes())]),
        Reading(
            Description("nvmesh_csi_storage_attachments", "Attachments on record, of all clients."),
            lambda: [((), attachments())],
        ),
    ]


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """What the kernel says of this process."""

    cpu_s: float
    resident_bytes: int
    virtual_bytes: int
    open_fds: int
    max_fds: int
    threads: int
    started_at_s: float
    """Seconds since the epoch."""


_PROCESS: tuple[tuple[str, str, Kind, Callable[[ProcessFigures], float]], ...] = (
    ("process_cpu_seconds_total", "User and system time.", Kind.COUNTER, lambda own: own.cpu_s),
    ("process_resident_memory_bytes", "Resident memory.", Kind.GAUGE, lambda own: own.resident_bytes),
    ("process_virtual_memory_bytes", "Virtual memory.", Kind.GAUGE, lambda own: own.virtual_bytes),
    ("process_open_fds", "Open file descriptors.", Kind.GAUGE, lambda own: own.open_fds),
    ("process_max_fds", "File descriptors that may be open.", Kind.GAUGE, lambda own: own.max_fds),
    ("process_threads", "Threads.", Kind.GAUGE, lambda own: own.threads),
    ("process_start_time_seconds", "Start, since the epoch.", Kind.GAUGE, lambda own: own.started_at_s),
)
"""Named as Prometheus wants them of every process."""


def process(read: Callable[[], ProcessFigures]) -> list[Measurement]:
    """Measure this process."""

    def reading(name: str, text: str, kind: Kind, value: Callable[[ProcessFigures], float]) -> Measurement:
        return Reading(Description(name, text), lambda: [((), value(read()))], kind)

    return [reading(*each) for each in _PROCESS]


def build(*, version: str, role: str, driver_name: str, python: str) -> Measurement:
    """Tell which program this is."""
    names = ("version", "role", "driver_name", "python_version")
    return Reading(
        Description("nvmesh_csi_build_info", "Always 1; the labels say what runs.", names),
        lambda: [((version, role, driver_name, python), 1)],
    )
