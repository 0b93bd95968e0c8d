# SPDX-License-Identifier: Apache-2.0
"""Responds to the page's requests: login, sessions, paths, and limits for browsers. It knows no server.

GET and HEAD change nothing but the session's idle time. POST is for login and logout, from a form of the page itself.
A request that names a host by which this server is not known is refused: with plain HTTP another site's name could be
made to lead here.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from csi_driver.errors import DriverError
from csi_driver.http_requests import HttpRequest, HttpResponse
from csi_driver.status_page.login import LoginLimit, OpenSessions, Session
from csi_driver.status_page.model import Storage, Wanted, prefix_of
from csi_driver.telemetry.log import recent

_log = logging.getLogger(__name__)

ROOT = "/status/"
_FORM_BYTES, _FIELD_CHARACTERS, _SEARCH_CHARACTERS = 8192, 1024, 256
_FEW_ERRORS = 5
_FILES = {"style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = (
    ("Content-Security-Policy", _POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    # Not no-referrer: with that a browser hides the origin of a form, which is checked.
    ("Referrer-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)

Values = Mapping[str, Any]
"""Values of a template by name."""


class _Refused(Exception):
    """The request is answered with a status, and a page with no other detail."""

    def __init__(self, status: int, *headers: tuple[str, str]) -> None:
        self.status, self.headers = status, headers
        super().__init__(str(status))


@dataclass(frozen=True, slots=True)
class _View:
    """A request of a user that is logged in, for one zone."""

    zone: str
    query: Mapping[str, str]

    def text(self, name: str) -> str:
        return self.query.get(name, "")[:_SEARCH_CHARACTERS]

    def wanted(self) -> Wanted:
        return Wanted(
            prefix_of(self.text("q")), self.text("at"), self.text("order") == "desc", self.text("unhealthy") == "1"
        )


@dataclass(eq=False)
class StatusPage:
    """`key`: returns the key of a login attempt for the limit. `cookie_name`: of the session's cookie."""

    storage: Storage
    cookie_name: str
    is_tls: bool
    key: Callable[[HttpRequest, str, str], Hashable]
    limit: LoginLimit = field(default_factory=LoginLimit)
    sessions: OpenSessions = field(default_factory=OpenSessions)

    def __post_init__(self) -> None:
        self._views: dict[str, Callable[[_View], tuple[str, Values]]] = {
            "": self._overview,
            "volumes": lambda view: ("volumes.html", self._list(self.storage.volumes, view)),
            "volume": self._volume,
            "attachments": self._attachments,
            "snapshots": lambda view: ("snapshots.html", self._list(self.storage.snapshots, view)),
            "errors": lambda _: ("errors.html", {"lines": recent()}),
        }

    def respond(self, request: HttpRequest) -> HttpResponse:
        """Return the response to a request for a path that begins with /status."""
        try:
            response = self._respond(request)
        except _Refused as refusal:
            response = _page("refused.html", {"status": refusal.status}, refusal.status, *refusal.headers)
        return HttpResponse(response.status, response.body, (*response.headers, *_HEADERS))

    def _respond(self, request: HttpRequest) -> HttpResponse:
        if not self.is_tls and not _is_own_host(request.headers.get("host", "")):
            raise _Refused(421)
        if request.path + "/" == ROOT:
            return _redirect(ROOT)
        name = request.path.removeprefix(ROOT)
        act = {("POST", "login"): self._log_in, ("POST", "logout"): self._log_out}.get((request.method, name))
        if act is not None:
            _check_origin(request)
            return act(request)
        if request.method != "GET":
            raise _Refused(405, ("Allow", "GET, HEAD, POST" if name == "login" else "GET, HEAD"))
        if name in _FILES:
            return HttpResponse(200, _file(name), (("Content-Type", _FILES[name]),))
        if name == "login":
            return self._login_page(request.query.get("zone", ""))
        if name not in self._views:
            raise _Refused(404)
        session = self.sessions.find(request.cookie(self.cookie_name))
        if session is None:
            return _redirect(f"{ROOT}login")
        return self._view(name, session, request.query)

    def _view(self, name: str, session: Session, query: Mapping[str, str]) -> HttpResponse:
        zones = self.storage.zones()
        zone = query.get("zone") or next((zone for zone in zones if zone in session.zones), "")
        if zone not in session.zones or zone not in zones:
            return _redirect(f"{ROOT}login")
        values: Values = {
            "title": self.storage.title, "page": name, "query": query, "zone": zone if len(zones) > 1 else "",
            "zones": [(each, each in session.zones) for each in zones] if len(zones) > 1 else [],
        }  # fmt: skip
        try:
            template, own = self._views[name](_View(zone, query))
        except DriverError as error:
            return _page("failed.html", {**values, "error": str(error)}, 503)
        return _page(template, {**values, **own})

    # --- login ---

    def _login_page(self, zone: str, problem: str = "", status: int = 200, *headers: tuple[str, str]) -> HttpResponse:
        zones = self.storage.zones()
        values = {"title": self.storage.title, "zones": zones if len(zones) > 1 else (), "zone": zone}
        return _page("login.html", {**values, "problem": problem}, status, *headers)

    def _log_in(self, request: HttpRequest) -> HttpResponse:
        form, zones = _form(request), self.storage.zones()
        username, password = form.get("username", ""), form.get("password", "")
        zone = form.get("zone", "") if len(zones) > 1 else zones[0]
        if zone not in zones or not username or not password:
            return self._login_page(zone, "Enter the user and the password.", 400)
        key = self.key(request, zone, username)
        if pause_s := math.ceil(self.limit.begin(key)):
            problem = f"Too many failed logins. Try again in {pause_s} s."
            return self._login_page(zone, problem, 429, ("Retry-After", str(pause_s)))
        try:
            is_accepted = self.storage.accepts(zone, username, password)
        except DriverError as error:
            _log.warning("status page: a login cannot be checked: %s", error)
            return self._login_page(zone, "The login cannot be checked now. Try again later.", 503)
        if not is_accepted:
            _log.warning("status page: a login from %s was refused", request.peer)  # a name may be a password
            return self._login_page(zone, "Wrong user or password.", 401)
        self.limit.succeeded(key)
        token = self.sessions.open(zone, request.cookie(self.cookie_name))
        return _redirect(ROOT, ("Set-Cookie", self._cookie_text(token)))

    def _log_out(self, request: HttpRequest) -> HttpResponse:
        self.sessions.close(request.cookie(self.cookie_name))
        return _redirect(f"{ROOT}login", ("Set-Cookie", f"{self._cookie_text('')}; Max-Age=0"))

    def _cookie_text(self, token: str) -> str:
        return f"{self.cookie_name}={token}; HttpOnly; SameSite=Strict; Path={ROOT}{'; Secure' if self.is_tls else ''}"

    # --- views: template and values ---

    def _overview(self, view: _View) -> tuple[str, Values]:
        lines = recent()
        nodes = self.storage.nodes(view.zone)
        shown = {"overview": self.storage.overview(view.zone), "nodes": nodes}
        return "overview.html", {**shown, "lines": lines[:_FEW_ERRORS], "line_count": len(lines)}

    def _volume(self, view: _View) -> tuple[str, Values]:
        found = self.storage.volume(view.zone, view.text("name"), view.text("at"))
        if found is None:
            raise _Refused(404)
        return "volume.html", {"found": found}

    def _attachments(self, view: _View) -> tuple[str, Values]:
        nodes = self.storage.nodes(view.zone)
        names = [node.name for node in nodes]
        node = view.text("node") or next(iter(names), "")
        if node and node not in names:
            raise _Refused(404)
        part = self.storage.attachments(view.zone, node, view.text("at"))
        return "attachments.html", {"nodes": nodes, "node": node, "part": part}

    def _list(self, listed: Callable[[str, Wanted], object], view: _View) -> Values:
        wanted, q = view.wanted(), view.text("q")
        return {"part": listed(view.zone, wanted), "wanted": wanted, "q": q, "is_ordered": self.storage.is_ordered}


def _page(template: str, values: Values, status: int = 200, *headers: tuple[str, str]) -> HttpResponse:
    from csi_driver.status_page.rendering import render  # not before a page is asked for: it loads jinja2

    body = render(template, values).encode("utf-8", "replace")
    return HttpResponse(status, body, (("Content-Type", "text/html; charset=utf-8"), *headers))


def _redirect(to: str, *headers: tuple[str, str]) -> HttpResponse:
    return HttpResponse(303, b"", (("Location", to), *headers))


def _file(name: str) -> bytes:
    return (Path(__file__).parent / "templates" / name).read_bytes()


def _form(request: HttpRequest) -> Mapping[str, str]:
    """Return the fields of a form; a field that is given twice is refused."""
    if request.content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise _Refused(415)
    if len(request.body) > _FORM_BYTES:
        raise _Refused(413)
    try:
        pairs = parse_qsl(request.body.decode("ascii"), errors="strict", max_num_fields=8)
    except ValueError as problem:
        raise _Refused(400) from problem
    if len(dict(pairs)) < len(pairs) or any(len(value) > _FIELD_CHARACTERS for _, value in pairs):
        raise _Refused(400)
    return dict(pairs)


def _check_origin(request: HttpRequest) -> None:
    """Refuse a form that another site has sent: a browser names the site with each POST."""
    origin, host = request.headers.get("origin", ""), request.headers.get("host", "")
    site = request.headers.get("sec-fetch-site", "same-origin")
    try:
        is_own = bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        is_own = False
    if not is_own or site not in ("same-origin", "none"):
        raise _Refused(403)


def _is_own_host(host: str) -> bool:
    """Return whether this machine can have the name: an address, a name without dots, of a cluster, or its own."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        is_local = "." not in name or name.endswith((".localhost", ".svc", ".cluster.local"))
        return bool(name) and (is_local or name == os.uname().nodename.lower())
    return True
