# SPDX-License-Identifier: Apache-2.0
"""Serves the page at an address of its own, for a process that serves no other HTTP requests of users."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager

from csi_driver.background import run_detached
from csi_driver.errors import PreconditionFailed
from csi_driver.http_requests import HttpResponse, HttpServer
from csi_driver.settings import HttpSettings
from csi_driver.status_page.login import LoginLimit
from csi_driver.status_page.model import Storage
from csi_driver.status_page.web import ROOT, StatusPage

_LOG = logging.getLogger(__name__)


class _PageServer(HttpServer):
    request_queue_size = most_connections = 32


@contextmanager
def serving_status(settings: HttpSettings, storage: Storage) -> Iterator[HttpSettings]:
    """Serve the page; give the address. Raises `PreconditionFailed` when that is not available.

    Few logins may fail: the storage must not take them for attacks of this process. All users share one address.
    """
    page = StatusPage(
        storage,
        cookie_name="nvmesh-controller-status",
        is_tls=False,
        key=lambda _request, zone, _username: zone,
        limit=LoginLimit(free=5, first_s=2.0, longest_s=300.0),
    )
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise PreconditionFailed(f"cannot listen on {settings}: {error.strerror or error}") from error
    server = _PageServer(listener, page.respond, None, HttpResponse(500), "status-connection")
    server.server_activate()
    running = run_detached("status-page", server.serve)
    host, port, *_ = server.socket.getsockname()
    address = HttpSettings(host, port)
    _LOG.info("serving the status page on http://%s%s", address, ROOT)
    try:
        yield address
    finally:
        server.is_ending = True
        wait([running])
        server.hang_up(socket.SHUT_RDWR)
        server.server_close()
