# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.telemetry.metrics import ManagementMetrics
from tests.unit.management.double import PASSWORD, USER, ManagementDouble, running

Connect = Callable[..., ManagementClient]


@pytest.fixture
def server() -> Iterator[ManagementDouble]:
    with running() as double:
        yield double


@pytest.fixture
def other_server() -> Iterator[ManagementDouble]:
    with running() as double:
        yield double


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return path


@pytest.fixture
def connect(password_file: Path) -> Iterator[Connect]:
    """Return a function that makes a client of these servers; all are closed in the end."""
    clients: list[ManagementClient] = []

    def make(*servers: str, metrics: ManagementMetrics | None = None, **options: object) -> ManagementClient:
        settings = ManagementSettings(
            servers=servers,
            username=USER,
            password_file=password_file,
            **options,  # type: ignore[arg-type]
        )
        clients.append(ManagementClient(settings, metrics=metrics))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(server: ManagementDouble, connect: Connect) -> ManagementClient:
    return connect(server.url)


@pytest.fixture
def deadline() -> Deadline:
    return Deadline.after(60)
