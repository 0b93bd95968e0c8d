# SPDX-License-Identifier: Apache-2.0
"""All expected failures, as one tree that knows neither gRPC nor HTTP. Source: CSI specification, "Error Scheme".

A *family* (a direct child of `DriverError`) groups failures by the caller's remedy; `csi_driver.rpc.boundary` maps it
to one gRPC code. A message reads `<thing>: expected <X>, got <Y>; <what to do>`. It may reach end users and must not
contain secrets. Text that a caller sent goes through `shown` first.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN_LIMIT = 96
LINE_LIMIT_CHARACTERS = 8192


def shown(text: object, limit: int = _SHOWN_LIMIT) -> str:
    """Quote text that came from outside: control characters escaped, at most `limit` characters."""
    quoted = ascii(text) if isinstance(text, str) else ascii(str(text))
    return quoted if len(quoted) <= limit else f"{quoted[:limit]}...' ({len(str(text))} characters)"


def one_line(text: str, limit: int = LINE_LIMIT_CHARACTERS) -> str:
    """Escape line breaks, terminal controls and the like, and shorten to about `limit` characters."""
    line = text if len(text) <= limit else f"{text[: limit - 3]}..."
    if line.isprintable():
        return line
    line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


class DriverError(Exception):
    """Root of all expected failures. Anything else that is raised is a bug."""


def same_again(error: DriverError) -> DriverError:
    """Return a copy: one exception object raised in several threads would mix their tracebacks."""
    again = type(error).__new__(type(error))
    again.__dict__.update(error.__dict__)
    again.args = error.args
    return again


class InvalidRequest(DriverError):
    """The request is malformed, incomplete or asks for something that the driver does not support."""


class NotFound(DriverError):
    """The volume, node, snapshot or source does not exist."""


class Incompatible(DriverError):
    """The object exists, is staged or is published with other properties than requested."""


class CapacityOutOfRange(DriverError):
    """The capacity range cannot be met by any volume, or by the existing one because its pool has no space."""


class Exhausted(DriverError):
    """The pool, the topology or the node has no capacity left."""


class PreconditionFailed(DriverError):
    """The current state of the volume, the device or the path forbids the operation."""


class OperationPending(DriverError):
    """Another operation on the same volume is in progress; a retry helps."""


class StaleToken(DriverError):
    """A list token that this driver did not issue or can no longer resume."""


class Denied(DriverError):
    """The given identity lacks permission (a wrong passphrase, a management user without rights)."""


class Unauthenticated(DriverError):
    """The credentials are missing or not accepted."""


class StorageUnavailable(DriverError):
    """The storage management is unreachable, does not respond in time, or sends an invalid response."""


class NotOffered(DriverError):
    """The RPC belongs to a capability that this process is not configured to offer."""


class HostFailure(DriverError):
    """The kernel or a tool of this machine refused."""


class MissingField(InvalidRequest):
    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is required but not set")


class InvalidField(InvalidRequest):
    """A field holds a value that cannot be used. `expected` completes "expected ..."; `action` is the remedy."""

    def __init__(self, field: str, value: object, expected: str, action: str = "") -> None:
        self.field = field
        super().__init__(f"{field}: expected {expected}, got {shown(value)}" + (f"; {action}" if action else ""))


class VolumeNotFound(NotFound):
    def __init__(self, volume_id: str, detail: str = "") -> None:
        super().__init__(f"volume {shown(volume_id)} does not exist" + (f": {detail}" if detail else ""))


class SnapshotNotFound(NotFound):
    def __init__(self, snapshot_id: str, detail: str = "") -> None:
        super().__init__(f"snapshot {shown(snapshot_id)} does not exist" + (f": {detail}" if detail else ""))


class NodeNotFound(NotFound):
    def __init__(self, node_id: str) -> None:
        super().__init__(f"node {shown(node_id)} is not registered in the storage management")


class ExistsDifferently(Incompatible):
    """Each difference has the expected and the found value."""

    def __init__(self, what: str, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__(f"{what} already exists with different properties: {'; '.join(differences)}")


class DeadlineReached(StorageUnavailable):
    """The caller's timeout expired; a retry continues. No duration in the text: equal events count as one."""

    def __init__(self, awaited: str) -> None:
        super().__init__(f"timed out waiting for {awaited}; a retry continues")


class IdentityNotProven(StorageUnavailable):
    def __init__(self, device: object, why: str) -> None:
        super().__init__(f"cannot prove which volume device {device} is: {why}; retry when the storage client works")


class CommandFailed(HostFailure):
    def __init__(self, argv: Sequence[str], status: int, stderr: str) -> None:
        self.status = status
        self.stderr = stderr
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        super().__init__(f"{' '.join(argv)} {how}: {stderr.strip()[-400:] or 'no error output'}")


class CommandTimedOut(HostFailure):
    def __init__(self, argv: Sequence[str], timeout_s: float) -> None:
        # A caller's remaining time differs in every call, and each text would be another Kubernetes event.
        limit = f"within {timeout_s:.0f} s" if timeout_s == int(timeout_s) else "in time"
        super().__init__(f"{' '.join(argv)} did not finish {limit} and was killed")


class ToolMissing(HostFailure):
    def __init__(self, program: str, package: str = "") -> None:
        super().__init__(f"{program} is not installed" + (f"; install the package {package}" if package else ""))


class SystemCallFailed(HostFailure):
    """A system call failed. `call` names it with its arguments, e.g. "mount /dev/nvmesh/v1 at /a"."""

    def __init__(self, call: str, errno_number: int, detail: str = "") -> None:
        import errno
        import os

        self.call = call
        self.errno = errno_number
        name = errno.errorcode.get(errno_number, str(errno_number))
        super().__init__(f"{call}: {os.strerror(errno_number)} ({name})" + (f": {detail}" if detail else ""))


class NotAttached(PreconditionFailed):
    """A staged volume lost its attachment: its device and filesystem on the node are unusable."""

    def __init__(self, volume_name: str, node: str) -> None:
        super().__init__(
            f"volume {volume_name} is no longer attached to node {node}, so its staged device is unusable; "
            "unstage the volume and stage it again"
        )


class ContentRefused(PreconditionFailed):
    """A volume is not used or formatted because of the content of its device; only a person can decide."""


class GrowsAtNextMount(PreconditionFailed):
    """The filesystem keeps its size while it is mounted as it is; it grows when the volume is staged next."""


class ReservationConflict(PreconditionFailed):
    """The volume is reserved in a conflicting mode (ids 1716 to 1718). `current_version`: where the server gave it."""

    def __init__(self, volume_name: str, management_id: int, current_version: int | None = None) -> None:
        self.management_id = management_id
        self.current_version = current_version
        reason = {
            1716: "the volume is read-only and write access was requested",
            1717: "it is reserved in another mode or by another client",
            1718: "it is reserved in another mode or by another client",
        }.get(management_id, "it is reserved in a conflicting mode")
        super().__init__(f"volume {volume_name} cannot be attached: {reason} (management id {management_id})")


class NotFreezable(PreconditionFailed):
    """Writes to a volume cannot be held for a moment, as a snapshot of several volumes needs it."""


class ServerUnreachable(StorageUnavailable):
    """A management server is unreachable or refused the request unread: the request was not executed."""

    def __init__(self, server: str, reason: str, *, timed_out: bool = False) -> None:
        self.reason = reason
        self.timed_out = timed_out
        super().__init__(f"management server {server} is unavailable: {reason}")


class OutcomeUnknown(StorageUnavailable):
    """A request without valid response: it may have been executed, unless `is_read`; check before repeating it."""

    def __init__(
        self, server: str, request: str, reason: str, *, timed_out: bool = False, is_read: bool = False
    ) -> None:
        self.reason = reason
        self.timed_out = timed_out
        maybe = "" if is_read else "; the request may have been executed"
        super().__init__(f"management server {server} gave no valid response to {request} ({reason}){maybe}")
