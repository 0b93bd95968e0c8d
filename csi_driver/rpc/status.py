"""Which gRPC code answers which failure: one table, proven total over the tree of `csi_driver.errors` by a test.

Source of the codes: CSI specification, "Error Scheme" and the error tables of every RPC.
"""

from __future__ import annotations

from types import MappingProxyType

import grpc

from csi_driver import errors

_CODES: dict[type[errors.DriverError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Incompatible: grpc.StatusCode.ALREADY_EXISTS,
    errors.CapacityOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.Exhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.PreconditionFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.OperationPending: grpc.StatusCode.ABORTED,
    errors.StaleToken: grpc.StatusCode.ABORTED,
    errors.Denied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.NotOffered: grpc.StatusCode.UNIMPLEMENTED,
    errors.HostFailure: grpc.StatusCode.INTERNAL,
}

CODES = MappingProxyType(_CODES)
"""Family of failures to gRPC code."""

_MESSAGE_LIMIT_CHARACTERS = 1000
# A status message travels in a trailer; clients accept 8 KiB of those, and other than ASCII is written there in
# three characters a byte (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, "Status-Message").


def code_of(error: errors.DriverError) -> grpc.StatusCode:
    """Return the code of the family that the error belongs to; INTERNAL for one that belongs to none."""
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    return grpc.StatusCode.INTERNAL


def message_of(error: errors.DriverError) -> str:
    """Return what the caller is told: never empty, one line, encodable, short enough for a trailer."""
    text = str(error) or type(error).__name__
    encodable = text.encode("utf-8", "backslashreplace").decode("utf-8")
    words = " ".join(encodable.split())
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words)
    return line if len(line) <= _MESSAGE_LIMIT_CHARACTERS else f"{line[: _MESSAGE_LIMIT_CHARACTERS - 3]}..."
