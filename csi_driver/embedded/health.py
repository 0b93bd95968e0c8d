"""Asks the manager over its own API, as a client does, whether it answers."""

from __future__ import annotations

import http.client
import ssl

from csi_driver.embedded.pool import Pool
from csi_driver.errors import DriverError

ANSWER_TIME_S = 2.0
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_OPEN_TO_ALL = "/login"  # needs no session


def why_silent(host: str, port: int, *, tls: bool) -> str:
    """Say why the API on this address does not answer; empty = it does."""
    host = _ANYWHERE.get(host, host)
    try:
        if tls:
            # It is this process, whatever its certificate says.
            context = ssl._create_unverified_context()  # noqa: S323
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=ANSWER_TIME_S, context=context
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=ANSWER_TIME_S)
        try:
            connection.request("GET", _OPEN_TO_ALL)
            status = connection.getresponse().status
        finally:
            connection.close()
    except (OSError, http.client.HTTPException) as error:
        return f"the API does not answer within {ANSWER_TIME_S:g} s: {type(error).__name__}: {error}"
    return "" if status == http.client.OK else f"the API answers with HTTP status {status}"


def why_unusable(pool: Pool) -> str:
    """Say why the pool cannot be used; empty = it can."""
    try:
        pool.free_bytes()
    except DriverError as error:
        return str(error)
    return ""
