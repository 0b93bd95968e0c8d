"""How far one gets with one management server, step by step: name, connection, certificate, time. Nobody logs in here.

For people who want to know why requests do not come through; requests themselves go by `transport`.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import socket
import ssl
from dataclasses import dataclass, replace
from enum import StrEnum
from urllib.parse import urlsplit

from csi_driver.management import tls
from csi_driver.management.settings import ManagementSettings

_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL


class Step(StrEnum):
    """What comes one after the other."""

    NAME = "look up its name"
    CONNECTION = "connect to it"
    FILES = "read the certificate files"
    HANDSHAKE = "agree with it on TLS"
    ANSWER = "get an answer"


@dataclass(frozen=True, slots=True)
class ConnectionCheck:
    """How far it went. `failed` is None where all went well; else `reason` says why not.

    `valid_until_s` and `date_s` are seconds since the epoch, None where nothing tells them. `is_expired`: its
    certificate, or one above it, is over.
    """

    addresses: tuple[str, ...] = ()
    failed: Step | None = None
    reason: str = ""
    is_expired: bool = False
    valid_until_s: float | None = None
    date_s: float | None = None


def check_connection(server: str, settings: ManagementSettings, *, timeout_s: float) -> ConnectionCheck:
    """Go as far as it goes; each step may take `timeout_s`. Changes nothing there."""
    url = urlsplit(server)
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return ConnectionCheck(failed=Step.NAME, reason=_why(error))
    seen = ConnectionCheck(addresses=tuple(dict.fromkeys(str(each[4][0]) for each in found)))
    try:
        connection = socket.create_connection((host, port), timeout=timeout_s)
    except OSError as error:
        return replace(seen, failed=Step.CONNECTION, reason=_why(error))
    with contextlib.closing(connection):
        if url.scheme != "https":
            return _asked(seen, connection, host)
        return _secured(seen, connection, host, settings)


def _secured(
    seen: ConnectionCheck, connection: socket.socket, host: str, settings: ManagementSettings
) -> ConnectionCheck:
    try:
        terms = tls.context(settings)
    except tls.BadCertificateFile as error:
        return replace(seen, failed=Step.FILES, reason=str(error))
    try:
        with terms.wrap_socket(connection, server_hostname=host) as secured:
            seen = replace(seen, valid_until_s=_valid_until_s(secured, host))
            return _asked(seen, secured, host)
    except ssl.SSLCertVerificationError as error:
        expired = error.verify_code == _EXPIRED
        return replace(seen, failed=Step.HANDSHAKE, reason=error.verify_message, is_expired=expired)
    except OSError as error:
        return replace(seen, failed=Step.HANDSHAKE, reason=_why(error))


def _valid_until_s(secured: ssl.SSLSocket, host: str) -> float | None:
    """Return until when the server's certificate is valid."""
    certificate = secured.getpeercert() or _read_unverified(secured, host)
    until = certificate.get("notAfter") if certificate else None
    return ssl.cert_time_to_seconds(until) if isinstance(until, str) else None


def _read_unverified(secured: ssl.SSLSocket, host: str) -> dict[str, object] | None:
    """Read a certificate that was not verified: the library decodes only what it could verify.

    So it is shown to it once more, with this very certificate as the one that is trusted.
    """
    shown = secured.getpeercert(binary_form=True)
    address = secured.getpeername()
    if shown is None:
        return None
    terms = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    terms.check_hostname = False
    terms.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    terms.load_verify_locations(cadata=shown)
    try:
        with (
            socket.create_connection(address[:2], timeout=secured.gettimeout()) as again,
            terms.wrap_socket(again, server_hostname=host) as verified,
        ):
            return dict(verified.getpeercert() or {})
    except OSError:
        return None


def _asked(seen: ConnectionCheck, connection: socket.socket, host: str) -> ConnectionCheck:
    """Ask for anything at all: whatever the answer is, it carries the server's time."""
    request = f"GET / HTTP/1.1\r\nHost: {host}\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    try:
        connection.sendall(request.encode("ascii", errors="replace"))
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        date = answer.getheader("Date")
        answer.close()
    except (OSError, http.client.HTTPException) as error:
        return replace(seen, failed=Step.ANSWER, reason=_why(error))
    return replace(seen, date_s=_seconds(date) if date else None)


def _seconds(date: str) -> float | None:
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
