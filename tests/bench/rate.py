# SPDX-License-Identifier: Apache-2.0
"""How many volumes a second are made on a management that takes 50 ms for each request, and how hard that presses it.

Needs no root: nothing is attached.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.model import GIB
from tests.bench.life import BLOCK
from tests.bench.measure import Timing, timed
from tests.bench.report import Report
from tests.bench.slow import SlowServer, slow_server
from tests.client import CsiClient

DELAY_S = 0.05


def measure_create_rate(directory: Path, report: Report, counts: dict[int, int], zones: Sequence[int]) -> None:
    """Print CreateVolume at several concurrencies, with one zone and with several."""
    columns = ("50 ms a request", "at once", "p50 ms", "p99 ms", "per second", "requests", "most at once")
    table = report.table("Rate on a slow management", columns)
    for many in zones:
        with controller_over(directory / f"rate-{many}", many) as (controller, servers):
            for at_once, count in counts.items():
                for server in servers:
                    server.reset()
                timing = _created(controller, f"rate-{at_once}", count, at_once)
                requests = sum(server.requests for server in servers) / count
                most = max(server.most_in_flight for server in servers)
                name = f"CreateVolume, {many} zone{'s' if many > 1 else ''}"
                latencies_ms = (timing.median_ms, timing.percentile_ms(99))
                table.row(name, at_once, *latencies_ms, timing.per_second, requests, most)
                if many == 1:
                    report.figure("create_requests", requests)


def _created(controller: CsiClient, prefix: str, count: int, at_once: int) -> Timing:
    def create(number: int) -> None:
        controller.create_volume(f"{prefix}-{number}", required_bytes=GIB, capabilities=[BLOCK])

    create(-1)  # logs in
    return timed(create, range(count), at_once=at_once)


@contextlib.contextmanager
def controller_over(
    directory: Path, zones: int, delay_s: float = DELAY_S
) -> Iterator[tuple[CsiClient, list[SlowServer]]]:
    """Run a controller over so many slow storage managers, each a zone."""
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        servers = []
        described = []
        for number in range(zones):
            pool = directory / f"pool-{number}"
            # The socket is bound here and inherited, so that nobody else gets the port meanwhile.
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP))
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
            stack.enter_context(_role("storage", *_storage_flags(directory, pool, listener), inherit=[listener]))
            _wait_for_port(port)
            server = stack.enter_context(slow_server(port, delay_s))
            servers.append(server)
            described.append(
                f"  zone-{number}: {{servers: 'http://127.0.0.1:{server.port}', user: admin@nvidia.com,"
                f" passwordFile: '{pool}/password'}}\n"
            )
        clusters = directory / "clusters.yaml"
        clusters.write_text("zones:\n" + "".join(described))
        endpoint = directory / "controller.sock"
        stack.enter_context(_role("controller", "--endpoint", str(endpoint), "--clusters-file", str(clusters)))
        controller = stack.enter_context(CsiClient(endpoint, timeout_s=300))
        reason = controller.wait_ready(Deadline.after(60))
        if reason:
            raise SystemExit(f"the controller did not become ready: {reason}")
        yield controller, servers


@contextlib.contextmanager
def _role(*argv: str, inherit: Sequence[socket.socket] = ()) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "csi_driver", *argv, "--log-level", "warning"],
        stdout=subprocess.DEVNULL,
        pass_fds=[each.fileno() for each in inherit],
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _storage_flags(directory: Path, pool: Path, listener: socket.socket) -> tuple[str, ...]:
    flags = ("--pool", str(pool), "--size", "40TiB", "--overcommit", "--listen", f"fd:{listener.fileno()}")
    return (*flags, "--device-directory", str(directory / "dev"), "--status-directory", str(directory / "proc"))


def _wait_for_port(port: int) -> None:
    def is_open() -> bool:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    if not Deadline.after(60).wait_until(is_open):
        raise SystemExit(f"no storage manager listens on port {port}")
