# SPDX-License-Identifier: Apache-2.0
"""Settings of the management client, and the credentials in the files that they name. Loads no HTTP client."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from csi_driver.errors import Unauthenticated
from csi_driver.flags import (
    Flag,
    flag,
    read_boolean,
    read_file,
    read_positive_count,
    read_positive_duration,
    read_text,
    repeatable,
)
from csi_driver.model import DEFAULT_ZONE
from csi_driver.settings import DRIVER_NAME

_DEFAULT_USER = "admin@nvidia.com"
TLS_VERIFY = Flag(True, "--management-tls-verify", read_boolean, "Reject servers with an unverifiable certificate.")
_MOST_READS = 3


@dataclass(frozen=True, slots=True)
class ManagementSettings:
    """How to reach the management of one storage cluster. Without a user the client certificate is the login.

    The files are read at each login, because a mounted Secret changes while the driver runs.
    """

    servers: tuple[str, ...] = repeatable(
        "--management-server",
        read_text.named("URL"),
        "URL of a management server, as https://HOST:PORT, in order of preference.",
        shown="none, with --clusters-file; else at least one must be given",
    )
    username: str = flag(
        "",
        "--management-user",
        read_text.named("USER"),
        "User for the login at the management.",
        shown=f"{_DEFAULT_USER}, where a password file is given",
    )
    username_file: Path | None = flag(
        None,
        "--management-user-file",
        read_file,
        "File with the user for the login, instead of --management-user; read again at every login.",
        shown="none",
    )
    password_file: Path | None = flag(
        None,
        "--management-password-file",
        read_file,
        "File with the user's password; read again at every login.",
        shown="none",
    )
    password: str = field(default="", repr=False)
    """Only from the configuration of an older driver."""
    zone: str = DEFAULT_ZONE
    """Name of the storage cluster, for the metrics."""
    ca_file: Path | None = flag(
        None,
        "--management-ca-file",
        read_file,
        "PEM CA certificates that verify the servers' certificates.",
        shown="the system's CA certificates",
    )
    tls_verify: bool = TLS_VERIFY.field()
    client_certificate: Path | None = flag(
        None,
        "--management-client-certificate",
        read_file,
        "PEM client certificate for the login, instead of a password.",
        shown="none",
    )
    client_key: Path | None = flag(
        None,
        "--management-client-key",
        read_file,
        "PEM private key of the client certificate.",
        shown="the certificate's file",
    )
    request_timeout_s: float = flag(
        30.0, "--management-request-timeout", read_positive_duration, "Time limit of one request to the management."
    )
    max_requests_in_flight: int = flag(
        16,
        "--management-requests",
        read_positive_count.named("N", "requests"),
        "Maximum number of concurrent requests to one management server.",
    )
    driver_name: str = DRIVER_NAME.field()
    allow_incompatible_versions: bool = flag(
        False,
        "--allow-incompatible-versions",
        read_boolean,
        "Accept a management with an API version below 15, at your own risk.",
    )

    def resolved(self) -> Self:
        """Fill in the default user, who logs in with the password file alone."""
        by_name = self.password_file is not None and self.username_file is None
        return replace(self, username=(self.username or _DEFAULT_USER) if by_name else "")

    @property
    def has_user(self) -> bool:
        """Whether the login is a user with a password; else it is the client certificate."""
        return bool(self.username) or self.username_file is not None

    @property
    def password_place(self) -> str:
        return str(self.password_file or "the clusters file")

    def problems(self) -> tuple[str, ...]:
        return (*self._server_problems(), *self._login_problems())

    def _server_problems(self) -> Iterator[str]:
        if not self.servers:
            yield "management servers: expected at least one URL, got none; set --management-server"
        for server in self.servers:
            yield from _url_problems(server)
        if len(set(self.servers)) != len(self.servers):
            yield "management servers: one is given twice; remove it"
        if self.request_timeout_s <= 0:
            yield f"request timeout: expected more than 0 s, got {self.request_timeout_s:g} s"
        if self.max_requests_in_flight < 1:
            yield f"limit of requests in flight: expected at least 1, got {self.max_requests_in_flight}"

    def _login_problems(self) -> Iterator[str]:
        if self.has_user and self.password_file is None and not self.password:
            yield f"management user {self.username or self.username_file}: no password; set --management-password-file"
        if not self.has_user and self.client_certificate is None:
            yield "login: expected a management user or a client certificate, got neither; set --management-user"
        if not self.has_user and self.client_certificate is not None:
            for server in self.servers:
                if server.startswith("http:"):
                    yield f"{server} is plain http, which cannot use the client certificate; use https"
        if self.client_key is not None and self.client_certificate is None:
            yield "--management-client-key requires --management-client-certificate"

    def warnings(self) -> Iterator[str]:
        """Yield a sentence for each insecure setting."""
        for server in self.servers:
            url = urlsplit(server)
            if url.scheme == "http" and not is_loopback(url.hostname or ""):
                yield f"{server} is plain http: the management password crosses the network unencrypted; use https"
            if url.scheme == "https" and not self.tls_verify:
                yield f"the certificate of {server} is not verified, so any host can impersonate it"


@dataclass(frozen=True, slots=True)
class ClusterDefaults:
    """Settings of the command line. `tls_is_decided`: --management-tls-verify is given."""

    management: ManagementSettings
    zone: str
    tls_is_decided: bool = False


def _url_problems(server: str) -> Iterator[str]:
    try:
        url = urlsplit(server)
        port = url.port
    except ValueError as error:
        yield f"management server: expected a URL, got {server!r}: {error}"
        return
    if url.username is not None or url.password is not None:
        yield "a management server's URL holds credentials; write them to --management-password-file"
    elif url.scheme not in ("http", "https") or not url.hostname or port == 0:
        yield f"management server: expected https://HOST:PORT, got {server!r}"
    elif url.path not in ("", "/") or url.query or url.fragment:
        yield f"management server: expected nothing after the port, got {server!r}"


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Credentials:
    """A user and its password, which `repr` hides."""

    username: str
    password: str = field(repr=False)


def read_credentials(settings: ManagementSettings) -> Credentials:
    """Read user and password. Raises `Unauthenticated` naming a file without content.

    Read until two readings agree: kubelet does not replace the files of a Secret atomically for a reader of both.
    """
    found = _read(settings)
    for _ in range(_MOST_READS):
        before, found = found, _read(settings)
        if found == before:
            break
    return found


def _read(settings: ManagementSettings) -> Credentials:
    username = settings.username
    if settings.username_file is not None:
        username = _content(settings.username_file, "user")
    if settings.password:
        return Credentials(username, settings.password)
    if settings.password_file is None:
        raise Unauthenticated(f"no password file is configured for user {username!r}")
    return Credentials(username, _content(settings.password_file, "password"))


def _content(path: Path, what: str) -> str:
    try:
        content = path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise Unauthenticated(f"the {what} file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        # Without a cause, which would carry the bytes of the file.
        raise Unauthenticated(f"the {what} file {path} is not UTF-8") from None
    if not content:
        raise Unauthenticated(f"the {what} file {path} is empty")
    return content
