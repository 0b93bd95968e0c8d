# SPDX-License-Identifier: Apache-2.0
"""Storage managers of 0, 10 and 10,000 volumes, and one browser for all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from csi_driver.embedded.model import VOLUMES, Reservation
from csi_driver.embedded.server import StorageServer
from csi_driver.embedded.store import Change
from tests.unit.embedded.fake_reflinks import FakeReflinks
from tests.unit.embedded.manager import GB, running, settings_in

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PASSWORD = "a password for tests"
HOSTILE = "<img src=x onerror=alert(1)>"
SIZES = (0, 10, 10_000)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs a browser; install the Debian package chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root the sandbox cannot be used.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=program, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, StorageServer]]:
    with ExitStack() as started:
        yield {size: started.enter_context(_server_of(tmp_path_factory, size)) for size in SIZES}


@contextmanager
def _server_of(paths: pytest.TempPathFactory, size: int) -> Iterator[StorageServer]:
    directory = paths.mktemp(f"pool{size}")
    settings = settings_in(directory, size_bytes=2 * max(size, 1) * GB)
    with running(settings, reflinks=FakeReflinks()) as manager:
        server = manager.server
        server.password.path.write_text(f"{PASSWORD}\n")
        if size:
            claim = {"csi.storage.k8s.io/pvc/namespace": "team-a", "csi.storage.k8s.io/pvc/name": HOSTILE}
            manager.save("a-first", metadata={"csi_name": "pvc-1", **claim})
            manager.attach("a-first")
            manager.cut("snap-1", "a-first")
            source = {"kind": "snapshot", "uuid": manager.snapshot("snap-1")["uuid"]}
            manager.clone("snap-1", "b-copy", **source)
            _put_more(server, size - 2)
        server.start()
        yield server


def _put_more(server: StorageServer, number: int) -> None:
    """Record more volumes, without files; every thousandth is unhealthy."""
    like = server.store.get(VOLUMES, "a-first")
    assert like is not None
    plain = replace(like, reservation=Reservation(), made=False, snapshots=0, shared_blocks=0)

    def put(change: Change) -> None:
        for index in range(number):
            name, health = f"v{index:05d}", "critical" if index % 1000 == 5 else "healthy"
            server.allocator.record(change, replace(plain, name=name, uuid=f"uuid-{index}", health=health))

    server.store.write(put)
