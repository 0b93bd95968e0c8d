"""What the management client must be told; checked together, so that all problems are reported at once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from csi_driver.model import DEFAULT_DRIVER_NAME


@dataclass(frozen=True, slots=True)
class ManagementSettings:
    """How to reach the storage management of one cluster.

    `servers` are URLs with scheme, host and port, in order of preference. With a user (by name, or in
    `username_file`) user and password are read from their files at every login, as a mounted Secret changes while we
    run; without one the client certificate is the identity. `request_timeout_s` bounds each request; the caller's
    deadline does too.
    """

    servers: tuple[str, ...]
    username: str = ""
    username_file: Path | None = None
    password_file: Path | None = None
    password: str = field(default="", repr=False)
    """Only where an older driver's configuration holds it; a file is read again, this is not."""
    ca_file: Path | None = None
    tls_verify: bool = True
    client_certificate: Path | None = None
    client_key: Path | None = None
    request_timeout_s: float = 30.0
    max_requests_in_flight: int = 16
    driver_name: str = DEFAULT_DRIVER_NAME
    allow_incompatible_versions: bool = False

    @property
    def has_user(self) -> bool:
        """Whether we log in with a password; else the client certificate says who we are."""
        return bool(self.username) or self.username_file is not None

    @property
    def password_place(self) -> str:
        """Where the password stands, for messages."""
        return str(self.password_file or "the description of the clusters")

    def problems(self) -> tuple[str, ...]:
        """Return all that makes these settings unusable, each a sentence naming the setting; empty = sound."""
        found = [] if self.servers else ["no management server is given, wanted at least one URL"]
        for server in self.servers:
            found.extend(_server_problems(server))
        if len(set(self.servers)) != len(self.servers):
            found.append("a management server is given twice")
        if self.has_user and self.password_file is None and not self.password:
            found.append(f"the management user {self.username or self.username_file} has no password file")
        if not self.has_user and self.client_certificate is None:
            found.append("neither a management user nor a client certificate is given")
        if not self.has_user and self.client_certificate is not None:
            plain = [server for server in self.servers if server.startswith("http:")]
            found.extend(f"{server} is plain http, where a client certificate says nothing to it" for server in plain)
        if self.client_key is not None and self.client_certificate is None:
            found.append("a client key is given without its certificate")
        if self.request_timeout_s <= 0:
            found.append(f"the request time-out is {self.request_timeout_s:g} s, wanted more than 0")
        if self.max_requests_in_flight < 1:
            found.append(f"requests in flight are limited to {self.max_requests_in_flight}, wanted at least 1")
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """Return what works but should not be left so: credentials in the clear, an unverified server."""
        found = []
        for server in self.servers:
            url = urlsplit(server)
            if url.scheme == "http" and not _is_loopback(url.hostname or ""):
                found.append(f"{server} is plain http: the management password crosses the network unencrypted")
            if url.scheme == "https" and not self.tls_verify:
                found.append(f"the certificate of {server} is not verified: anybody may answer in its place")
        return tuple(found)


def _server_problems(server: str) -> list[str]:
    try:
        url = urlsplit(server)
        port = url.port
    except ValueError as error:
        return [f"management server {server!r} is not a URL: {error}"]
    if url.username is not None or url.password is not None:
        return ["a management server's URL carries credentials, wanted them in a file"]
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        return [f"management server is {server!r}, wanted https://HOST:PORT"]
    if url.path not in ("", "/") or url.query or url.fragment:
        return [f"management server is {server!r}, wanted nothing after the port"]
    return []


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
