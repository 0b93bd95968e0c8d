# SPDX-License-Identifier: Apache-2.0
"""A storage for the status page whose texts are hostile, and a browser that speaks to the page without a socket."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlencode, urlsplit

from csi_driver.deadline import SYSTEM_CLOCK, Clock
from csi_driver.errors import DriverError
from csi_driver.http_requests import HttpRequest, HttpResponse
from csi_driver.status_page import model
from csi_driver.status_page.login import LoginLimit, OpenSessions
from csi_driver.status_page.model import Part, Wanted
from csi_driver.status_page.web import StatusPage

HOSTILE = "\"><script>alert('x')</script>&\r\nSet-Cookie: a=b{{ 777 * 777 }}"
PASSWORD = "correct horse"
HOST = "127.0.0.1:9806"


@dataclass
class HostileStorage:
    """Each text that it shows is HOSTILE. `failure`: raised instead of an answer."""

    names: Sequence[str] = ("zone-1",)
    failure: DriverError | None = None
    attempts: list[str] = field(default_factory=list)
    is_ordered: bool = True
    title: str = HOSTILE

    def zones(self) -> Sequence[str]:
        return self.names

    def accepts(self, zone: str, username: str, password: str) -> bool:
        self.attempts.append(zone)
        self._fail()
        return (username, password) == ("admin", PASSWORD)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure

    def overview(self, zone: str) -> model.Overview:
        self._fail()
        capacity = model.Capacity(1 << 40, 1 << 39, 5, 1)
        return model.Overview(HOSTILE, capacity, [model.Check(HOSTILE, HOSTILE)], 1, 1, 1, 1)

    def volumes(self, zone: str, wanted: Wanted) -> Part[model.Volume]:
        self._fail()
        return Part([self._volume()], 1, 1, HOSTILE, HOSTILE)

    def _volume(self) -> model.Volume:
        source = model.Source(HOSTILE, HOSTILE, HOSTILE)
        return model.Volume(HOSTILE, 5, HOSTILE, HOSTILE, HOSTILE, source, [HOSTILE], HOSTILE)

    def volume(self, zone: str, name: str, at: str) -> model.VolumeDetails | None:
        self._fail()
        if name == "absent":
            return None
        snapshots = self.snapshots(zone, Wanted())
        source = model.Source("volume", HOSTILE)
        attachments = self.attachments(zone, "", "").rows
        return model.VolumeDetails(
            self._volume(), [(HOSTILE, HOSTILE)], attachments, [source, source], snapshots, [HOSTILE]
        )

    def nodes(self, zone: str) -> Sequence[model.Node]:
        self._fail()
        return [model.Node(HOSTILE, HOSTILE, False, 1, HOSTILE)]

    def attachments(self, zone: str, node: str, at: str) -> Part[model.Attachment]:
        self._fail()
        return Part([model.Attachment(*[HOSTILE] * 8)], 1, 1, None, HOSTILE)

    def snapshots(self, zone: str, wanted: Wanted) -> Part[model.Snapshot]:
        self._fail()
        return Part([model.Snapshot(HOSTILE, HOSTILE, 5, HOSTILE, HOSTILE, HOSTILE, True, [HOSTILE])], 1, 1)


@dataclass
class Browser:
    """Keeps cookies and sends what a browser sends with each request."""

    page: StatusPage
    headers: Mapping[str, str] = field(default_factory=lambda: {"host": HOST})
    cookie: str = ""

    def get(self, target: str, method: str = "GET", **headers: str) -> HttpResponse:
        parts = urlsplit(target)
        return self._send(HttpRequest(method, parts.path, dict(parse_qsl(parts.query)), self._headers(headers)))

    def post(self, path: str, form: Mapping[str, str] | bytes, **headers: str) -> HttpResponse:
        body = form if isinstance(form, bytes) else urlencode(form).encode()
        sent = {"content-type": "application/x-www-form-urlencoded", "origin": f"http://{self.headers['host']}"}
        return self._send(HttpRequest("POST", path, {}, self._headers({**sent, **headers}), body, "192.0.2.1"))

    def log_in(self, password: str = PASSWORD, **fields: str) -> HttpResponse:
        return self.post("/status/login", {"username": "admin", "password": password, **fields})

    def _headers(self, more: Mapping[str, str]) -> Mapping[str, str]:
        given = {name.replace("_", "-"): value for name, value in more.items()}
        return {**self.headers, "cookie": self.cookie, **given}

    def _send(self, request: HttpRequest) -> HttpResponse:
        response = self.page.respond(request)
        for text in values_of(response, "Set-Cookie"):
            self.cookie = text.partition(";")[0]
        return response


def page_of(
    storage: HostileStorage | None = None, *, is_tls: bool = False, idle_s: float = 600.0, clock: Clock = SYSTEM_CLOCK
) -> StatusPage:
    return StatusPage(
        storage or HostileStorage(),
        cookie_name="status",
        is_tls=is_tls,
        key=lambda request, zone, username: (request.peer, zone, username),
        limit=LoginLimit(free=3, clock=clock),
        sessions=OpenSessions(idle_s, clock),
    )


def logged_in(page: StatusPage | None = None) -> Browser:
    browser = Browser(page or page_of())
    assert browser.log_in().status == 303
    return browser


def values_of(response: HttpResponse, name: str) -> list[str]:
    return [value for found, value in response.headers if found == name]


def text_of(response: HttpResponse) -> str:
    return text_only(response.body.decode())


def text_only(page: str) -> str:
    """Return what a page says, without its tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
