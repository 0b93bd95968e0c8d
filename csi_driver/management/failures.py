# SPDX-License-Identifier: Apache-2.0
"""Meaning of the numeric ids in the management's errors, for each operation; the innermost id decides.

A running server lists its ids at `GET /getAllSystemMessages`. Texts decide nothing, with one exception: a creation
without space answers 1664 with the bare string "Failed to allocate" in place of an inner error with an id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum, auto

from csi_driver import errors
from csi_driver.errors import DriverError, shown

CREATE_FAILED = 1664
PASSWORD_CHANGE_REQUIRED = 1268
LOGIN_REQUIRED = 1267
VOLUME_NOT_FOUND = 1543
SERVER_RETIRED = frozenset({16268, 16269})
"""The server is being upgraded or shut down, and did not look at the request."""

_NO_ALLOCATION = "Failed to allocate"
_TEXT_LIMIT = 256


class NotLarger(errors.PreconditionFailed):
    """The requested capacity is not larger than the volume's."""


class Operation(StrEnum):
    """A request, as messages name it."""

    READ = "read"
    CREATE = "create"
    EXTEND = "extend"
    DELETE = "delete"
    UPDATE = "update"
    ENCRYPT = "initialise the encryption of"
    ATTACH = "attach"
    DETACH = "detach"
    CLONE = "copy the source to"
    CUT = "cut"
    REMOVE = "remove"
    RECLAIM = "give back space of"


class Meaning(Enum):
    """Meaning of an id for the driver."""

    DONE = auto()
    VOLUME_ABSENT = auto()
    CLIENT_ABSENT = auto()
    VPG_ABSENT = auto()
    SNAPSHOT_ABSENT = auto()
    EXISTS = auto()
    NO_SPACE = auto()
    BAD_REQUEST = auto()
    IN_PROGRESS = auto()
    PENDING = auto()
    FORBIDDEN = auto()
    NOT_LARGER = auto()
    RESERVED = auto()
    DENIED = auto()
    TOO_SMALL = auto()
    IN_USE = auto()
    SERVER_ERROR = auto()


def _ids(meaning: Meaning, *ids: int) -> dict[int, Meaning]:
    return dict.fromkeys(ids, meaning)


_ALWAYS = {
    **_ids(Meaning.BAD_REQUEST, 422),
    **_ids(Meaning.DENIED, 401),
    **_ids(Meaning.VOLUME_ABSENT, VOLUME_NOT_FOUND),
}
_CREATE = {
    **_ALWAYS,
    **_ids(Meaning.DONE, 1663, 1667),
    **_ids(Meaning.EXISTS, 1523),
    **_ids(Meaning.NO_SPACE, 1544),
    **_ids(Meaning.BAD_REQUEST, 1514, 1512, 1513, 1721, 16824, 1552, 1606, 1665, 1161, 1521, 1522),
    **_ids(Meaning.FORBIDDEN, 16825),
    **_ids(Meaning.PENDING, 16358),
}
# Of the embedded manager only.
_SNAPSHOTS = {
    **_ids(Meaning.SNAPSHOT_ABSENT, 91002, 91010),
    **_ids(Meaning.FORBIDDEN, 91003, 91004, 91008, 91009, 91012),
    **_ids(Meaning.NO_SPACE, 91005),
    **_ids(Meaning.PENDING, 91006),
    **_ids(Meaning.BAD_REQUEST, 91007),
    **_ids(Meaning.TOO_SMALL, 91011),
}

MEANINGS: Mapping[Operation, Mapping[int, Meaning]] = {
    Operation.READ: {
        **_ALWAYS,
        **_SNAPSHOTS,
        **_ids(Meaning.CLIENT_ABSENT, 1608),
        **_ids(Meaning.VPG_ABSENT, 16220),
    },
    Operation.CREATE: _CREATE,
    Operation.CLONE: {**_CREATE, **_SNAPSHOTS},
    Operation.CUT: {**_ALWAYS, **_SNAPSHOTS, **_ids(Meaning.EXISTS, 91001)},
    Operation.REMOVE: {**_ALWAYS, **_SNAPSHOTS},
    Operation.EXTEND: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1670),
        **_ids(Meaning.VOLUME_ABSENT, 1671),
        **_ids(Meaning.PENDING, 1572, 1581, 1676, 16190, 16358),
        **_ids(Meaning.FORBIDDEN, 1672, 1674, 1680, 16825),
        **_ids(Meaning.NOT_LARGER, 1673),
        **_ids(Meaning.NO_SPACE, 1675),
    },
    Operation.DELETE: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1689, 1690),
        **_ids(Meaning.VOLUME_ABSENT, 1682),
        **_ids(Meaning.PENDING, 1571, 1688),
        **_ids(Meaning.FORBIDDEN, 1683, 1686, 1563),
    },
    Operation.UPDATE: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1678),
        **_ids(Meaning.PENDING, 1582),
        # The volume can never have it: its provisioning group decides, or it is a snapshot.
        **_ids(Meaning.BAD_REQUEST, 168412, 168413, 1722, 1512, 1513, 1721, 1680),
        **_ids(Meaning.FORBIDDEN, 1603, 1604, 1605, 1564, 1472),
    },
    Operation.ENCRYPT: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 14592),
        # The encryption is initialised or being initialised; the volume's document tells which.
        **_ids(Meaning.IN_PROGRESS, 16792, 167921, 16794),
        **_ids(Meaning.FORBIDDEN, 16793),
    },
    # Of the embedded manager only.
    Operation.RECLAIM: {**_ALWAYS, **_ids(Meaning.IN_USE, 91013), **_SNAPSHOTS},
    Operation.ATTACH: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1611, 16112),
        **_ids(Meaning.VOLUME_ABSENT, 1693),
        **_ids(Meaning.CLIENT_ABSENT, 1621, 1608),
        **_ids(Meaning.RESERVED, 1716, 1717, 1718),
        **_ids(Meaning.PENDING, 1719, 16303, 11212),
        **_ids(Meaning.FORBIDDEN, 1569, 1607, 1720, 162821),
        **_ids(Meaning.DENIED, 1620),
    },
    Operation.DETACH: {
        **_ALWAYS,
        # Already detached, or no such client or volume: the result is the desired one.
        **_ids(Meaning.DONE, 1706, 17061, 162222, 162223, 1622, 1608, VOLUME_NOT_FOUND),
        **_ids(Meaning.PENDING, 16303),
    },
}


@dataclass(frozen=True, slots=True)
class ApiError:
    """The error in a response: its ids, innermost first, and its text."""

    ids: tuple[int, ...]
    text: str
    current_version: int | None = None
    no_allocation: bool = False

    @property
    def main_id(self) -> int | None:
        return self.ids[-1] if self.ids else None


def error_in(envelope: Mapping[str, object]) -> ApiError | None:
    """Return the error in an envelope, None for a success. `success` does not decide: a WARNING has `success: true`."""
    error = envelope.get("error")
    if error is None and "systemMessage" in envelope:
        error = envelope
    if error is None:
        return None if envelope.get("success", True) is True else ApiError((), "no reason given")
    if not isinstance(error, dict):
        return ApiError((), shown(error, _TEXT_LIMIT))
    chain = _chain(error)
    return ApiError(
        ids=tuple(number for each in reversed(chain) if (number := _id(each)) is not None),
        text=_text(chain),
        current_version=next((v for each in chain if isinstance(v := each.get("volumeReservation"), int)), None),
        no_allocation=error.get("innerMessage") == _NO_ALLOCATION,
    )


def meaning_of(operation: Operation, error: ApiError) -> tuple[Meaning, int | None]:
    """Return the meaning of an error for this operation, and the id that decided."""
    table = MEANINGS[operation]
    for number in error.ids:
        if number in table:
            return table[number], number
    if operation in (Operation.CREATE, Operation.CLONE) and error.no_allocation and CREATE_FAILED in error.ids:
        return Meaning.NO_SPACE, CREATE_FAILED
    return Meaning.SERVER_ERROR, error.main_id


def failure_of(
    operation: Operation, error: ApiError, *, volume: str = "", client: str = "", vpg: str = "", snapshot: str = ""
) -> DriverError:
    """Return the exception for an error; the other arguments name the objects of the request."""
    meaning, number = meaning_of(operation, error)
    match meaning:
        case Meaning.VOLUME_ABSENT:
            return errors.VolumeNotFound(volume)
        case Meaning.CLIENT_ABSENT:
            return errors.NodeNotFound(client)
        case Meaning.SNAPSHOT_ABSENT:
            return errors.SnapshotNotFound(snapshot)
        case Meaning.RESERVED if number is not None:
            return errors.ReservationConflict(volume, number, error.current_version)
    names = (("snapshot", snapshot), ("volume", volume), ("client", client), ("VPG", vpg))
    subject = " on ".join(f"{kind} {shown(name)}" for kind, name in names if name) or "the requested object"
    family = _FAMILIES.get(meaning, errors.StorageUnavailable)
    return family(f"the management refuses to {operation} {subject}: {error.text} (management id {number})")


_FAMILIES: Mapping[Meaning, type[DriverError]] = {
    Meaning.NO_SPACE: errors.Exhausted,
    Meaning.BAD_REQUEST: errors.InvalidRequest,
    Meaning.PENDING: errors.OperationPending,
    Meaning.FORBIDDEN: errors.PreconditionFailed,
    Meaning.NOT_LARGER: NotLarger,
    Meaning.DENIED: errors.Denied,
    Meaning.TOO_SMALL: errors.CapacityOutOfRange,
    Meaning.EXISTS: errors.Incompatible,
}


def _chain(error: object) -> list[dict[str, object]]:
    chain: list[dict[str, object]] = []
    while isinstance(error, dict) and len(chain) < 8:
        chain.append(error)
        error = error.get("innerMessage")
    return chain


def _id(error: dict[str, object]) -> int | None:
    # In errors of lists the id is one level deeper, in an object of the server's own.
    message = error.get("systemMessage")
    number = message.get("id") if isinstance(message, dict) else error.get("id")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _text(chain: list[dict[str, object]]) -> str:
    texts = [each["message"] for each in chain if isinstance(each.get("message"), str)]
    if isinstance(innermost := chain[-1].get("innerMessage"), str):
        texts.append(innermost)
    return shown(": ".join(map(str, texts)), _TEXT_LIMIT) if texts else "no reason given"
