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
        return str(self.password_file or "the clusters file")

    def problems(self) -> tuple[str, ...]:
        """Return all that makes these settings unusable, each a sentence naming the setting; empty = sound."""
        found = (
            [] if self.servers else ["management servers: expected at least one URL, got none; set --management-server"]
        )
        for server in self.servers:
            found.extend(_server_problems(server))
        if len(set(self.servers)) != len(self.servers):
            found.append("management servers: one is given twice; remove it")
        if self.has_user and self.password_file is None and not self.password:
            found.append(
                f"management user {self.username or self.username_file}: no password; set --management-password-file"
            )
        if not self.has_user and self.client_certificate is None:
            found.append(
                "login: expected a management user or a client certificate, got neither; set --management-user"
            )
        if not self.has_user and self.client_certificate is not None:
            plain = [server for server in self.servers if server.startswith("http:")]
            found.extend(
                f"{server} is plain http, which cannot use the client certificate; use https" for server in plain
            )
        if self.client_key is not None and self.client_certificate is None:
            found.append("--management-client-key requires --management-client-certificate")
        if self.request_timeout_s <= 0:
            found.append(f"request timeout: expected more than 0 s, got {self.request_timeout_s:g} s")
        if self.max_requests_in_flight < 1:
            found.append(f"limit of requests in flight: expected at least 1, got {self.max_requests_in_flight}")
        return tuple(found)

    def warnings(self) -> tuple[str, ...]:
        """Return what works but should not be left so: credentials in the clear, an unverified server."""
        found = []
        for server in self.servers:
            url = urlsplit(server)
            if url.scheme == "http" and not _is_loopback(url.hostname or ""):
                found.append(
                    f"{server} is plain http: the management password crosses the network unencrypted; use https"
                )
            if url.scheme == "https" and not self.tls_verify:
                found.append(f"the certificate of {server} is not verified, so any host can impersonate it")
        return tuple(found)


def _server_problems(server: str) -> list[str]:
    try:
        url = urlsplit(server)
        port = url.port
    except ValueError as error:
        return [f"management server: expected a URL, got {server!r}: {error}"]
    if url.username is not None or url.password is not None:
        return ["a management server's URL holds credentials; write them to --management-password-file"]
    if url.scheme not in ("http", "https") or not url.hostname or port == 0:
        return [f"management server: expected https://HOST:PORT, got {server!r}"]
    if url.path not in ("", "/") or url.query or url.fragment:
        return [f"management server: expected nothing after the port, got {server!r}"]
    return []


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
