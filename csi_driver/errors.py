"""Every way in which the driver can fail, as one tree that knows neither gRPC nor HTTP.

A *family* (a direct child of `DriverError`) says what the caller can do about it; `csi_driver.rpc.status`
maps each family to one gRPC code, and a test proves that table total. A *leaf* carries the data of one kind
of failure and writes its own message, so that every place that meets it says the same thing.

Messages say what is and what was wanted, with the facts an operator needs. They may reach end users, so
nothing secret is ever put into one. Text that a caller sent goes through `shown` first.

Source of the families' meanings: CSI specification, "Error Scheme" of every RPC.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN_LIMIT = 96


def shown(text: object, limit: int = _SHOWN_LIMIT) -> str:
    """Quote text that came from outside: control characters escaped, at most `limit` characters."""
    quoted = ascii(text) if isinstance(text, str) else ascii(str(text))
    return quoted if len(quoted) <= limit else f"{quoted[:limit]}...' ({len(str(text))} characters)"


class DriverError(Exception):
    """Root of all expected failures. Anything else that is raised is a bug."""


# --- families -------------------------------------------------------------------------------------------


class InvalidRequest(DriverError):
    """The request is malformed, incomplete or asks for something the driver never does."""


class NotFound(DriverError):
    """The volume, node, snapshot or source does not exist."""


class Incompatible(DriverError):
    """It exists, or is staged or published there, with other properties than those asked for."""


class CapacityOutOfRange(DriverError):
    """The capacity range cannot be honoured: by no volume, or by none that is there already, for lack of room."""


class Exhausted(DriverError):
    """The pool, the topology or the node has no room for it."""


class PreconditionFailed(DriverError):
    """The state of the volume, the device or the path forbids it now."""


class OperationPending(DriverError):
    """Another operation on the same volume is under way; the same call later will do."""


class StaleToken(DriverError):
    """A list token that this driver did not issue or can no longer resume."""


class Denied(DriverError):
    """The identity given may not do this (a wrong passphrase, a management user without rights)."""


class Unauthenticated(DriverError):
    """The credentials are missing or not accepted."""


class StorageUnavailable(DriverError):
    """The storage management cannot be reached, does not answer in time, or answers what cannot be read."""


class NotOffered(DriverError):
    """The call belongs to a capability that is not offered as this process is configured."""


class HostFailure(DriverError):
    """The kernel or a tool of this machine refused."""


# --- leaves: requests -----------------------------------------------------------------------------------


class MissingField(InvalidRequest):
    """A field that the specification marks REQUIRED is not set."""

    def __init__(self, field: str) -> None:
        self.field = field
        super().__init__(f"{field} is required and not set")


class InvalidField(InvalidRequest):
    """A field holds a value that cannot be used. `wanted` completes "wanted ..."."""

    def __init__(self, field: str, value: object, wanted: str) -> None:
        self.field = field
        super().__init__(f"{field} is {shown(value)}, wanted {wanted}")


# --- leaves: objects ------------------------------------------------------------------------------------


class VolumeNotFound(NotFound):
    """No volume has this id."""

    def __init__(self, volume_id: str, detail: str = "") -> None:
        self.volume_id = volume_id
        super().__init__(f"volume {shown(volume_id)} does not exist" + (f": {detail}" if detail else ""))


class NodeNotFound(NotFound):
    """No node (storage client) has this id."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        super().__init__(f"node {shown(node_id)} is not known to the storage management")


class ExistsDifferently(Incompatible):
    """The object exists with other properties. Each difference reads "is X, wanted Y"."""

    def __init__(self, what: str, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__(f"{what} exists with other properties: {'; '.join(differences)}")


# --- leaves: waiting ------------------------------------------------------------------------------------


class DeadlineReached(StorageUnavailable):
    """The caller's time ran out while something was awaited; the same call later goes on from there."""

    def __init__(self, awaited: str, waited_s: float) -> None:
        super().__init__(f"still waiting for {awaited} after {waited_s:.1f} s; call again to go on")


class IdentityNotProven(StorageUnavailable):
    """Nothing tells at this moment which volume a device is; it can be told again when the storage client is back."""

    def __init__(self, device: object, why: str) -> None:
        super().__init__(f"nothing on this machine proves now which volume {device} is: {why}; call again")


# --- leaves: the machine --------------------------------------------------------------------------------


class CommandFailed(HostFailure):
    """A program ended with a status that is not an answer."""

    def __init__(self, argv: Sequence[str], status: int, stderr: str) -> None:
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        super().__init__(f"{' '.join(argv)} {how}: {stderr.strip()[-400:] or 'it printed no reason'}")


class CommandTimedOut(HostFailure):
    """A program did not end within the time it was given; it was killed."""

    def __init__(self, argv: Sequence[str], timeout_s: float) -> None:
        self.argv = tuple(argv)
        super().__init__(f"{' '.join(argv)} did not end within {timeout_s:g} s and was killed")


class ToolMissing(HostFailure):
    """A program that the host must have is not installed."""

    def __init__(self, program: str, package: str = "") -> None:
        self.program = program
        super().__init__(f"{program} is not installed" + (f"; it is in the package {package}" if package else ""))


class SystemCallFailed(HostFailure):
    """A system call failed. `call` names it with its objects, e.g. "mount /dev/nvmesh/v1 at /a"."""

    def __init__(self, call: str, errno_number: int, detail: str = "") -> None:
        import errno
        import os

        self.call = call
        self.errno = errno_number
        name = errno.errorcode.get(errno_number, str(errno_number))
        super().__init__(f"{call}: {os.strerror(errno_number)} ({name})" + (f": {detail}" if detail else ""))


# --- leaves: attachments ----------------------------------------------------------------------------------


class NotAttached(PreconditionFailed):
    """An attachment that was to be there is not: what was made on top of it is worth nothing any more."""

    def __init__(self, volume_name: str, node: str) -> None:
        super().__init__(
            f"volume {volume_name} is not attached to node {node} any more, wanted it attached as when it was staged; "
            "it must be unstaged, and staged again"
        )


class ReservationConflict(PreconditionFailed):
    """The management refused an attachment because the volume is held otherwise (its ids 1716, 1717, 1718).

    `current_version` is the volume's reservation version where the management told it.
    """

    def __init__(self, volume_name: str, management_id: int, current_version: int | None = None) -> None:
        self.volume_name = volume_name
        self.management_id = management_id
        self.current_version = current_version
        reason = {
            1716: "it is a read-only volume and a write mode was asked for",
            1717: "it is held in another mode or by another client",
            1718: "it is held in another mode or by another client",
        }.get(management_id, "it is held otherwise")
        super().__init__(f"volume {volume_name} cannot be attached: {reason} (management id {management_id})")


# --- leaves: the storage management -----------------------------------------------------------------------


class ServerUnreachable(StorageUnavailable):
    """A management server could not be asked: the request certainly did not reach it, or it turned it away unread."""

    def __init__(self, server: str, reason: str, *, timed_out: bool = False) -> None:
        self.server = server
        self.reason = reason
        self.timed_out = timed_out
        super().__init__(f"management server {server} cannot be asked: {reason}")


class OutcomeUnknown(StorageUnavailable):
    """A request was sent and no readable answer came: it may have been carried out. Look before repeating it."""

    def __init__(self, server: str, request: str, reason: str, *, timed_out: bool = False) -> None:
        self.server = server
        self.request = request
        self.reason = reason
        self.timed_out = timed_out
        super().__init__(
            f"management server {server} gave no answer to {request} ({reason}); it is not known whether it did it"
        )
