"""How the management's servers prove themselves, and how we do: certificates from files that may be exchanged."""

from __future__ import annotations

import ssl
from pathlib import Path

from csi_driver.management.settings import ManagementSettings

Stamp = tuple[tuple[int, int, int] | None, ...]


def stamp(settings: ManagementSettings) -> Stamp:
    """Return what differs as soon as one of the certificate files is another one."""
    files = (settings.ca_file, settings.client_certificate, settings.client_key)
    return tuple(_stamp(path) for path in files if path is not None)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def context(settings: ManagementSettings) -> ssl.SSLContext:
    """Return the terms for connections, from the files as they are now. Raises `BadCertificateFile` naming one."""
    if settings.ca_file is None:
        made = ssl.create_default_context()
    else:
        # Those alone: authorities of the system have no say where one is named.
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            made.load_verify_locations(cafile=settings.ca_file)
        except OSError as error:
            raise BadCertificateFile(f"the CA file {settings.ca_file}", error) from error
    if not settings.tls_verify:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    if settings.client_certificate is not None:
        try:
            # A key that wants a passphrase must not ask for it at the terminal.
            made.load_cert_chain(settings.client_certificate, settings.client_key, password=b"")
        except OSError as error:
            key = f" with the key {settings.client_key}" if settings.client_key is not None else ""
            raise BadCertificateFile(f"the client certificate {settings.client_certificate}{key}", error) from error
    return made


class BadCertificateFile(Exception):
    """A file does not hold what it should. `what` names it."""

    def __init__(self, what: str, error: OSError) -> None:
        why = getattr(error, "reason", None) or error.strerror or "it holds no certificate"
        super().__init__(f"{what} cannot be used: {why}")
