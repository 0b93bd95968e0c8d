"""What the management's numeric ids mean, per operation: one table, read by id, innermost id first.

The numbers are those of the management's `systemMessages` (a running server lists them under
`GET /getAllSystemMessages`). Nothing is ever decided by a message text, with one exception: a creation that
finds no space answers 1664 with the bare string "Failed to allocate" where other causes have an object with an
id, so that string is the only sign there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto

from csi_driver.errors import (
    Denied,
    DriverError,
    Exhausted,
    InvalidRequest,
    NodeNotFound,
    OperationPending,
    PreconditionFailed,
    ReservationConflict,
    StorageUnavailable,
    VolumeNotFound,
    shown,
)

CREATE_FAILED = 1664
PASSWORD_CHANGE_REQUIRED = 1268
LOGIN_REQUIRED = 1267
VOLUME_NOT_FOUND = 1543
NOT_ENOUGH = 1673
SERVER_RETIRED = frozenset({16268, 16269})
"""Upgrade mode, shutting down: the request was not looked at, another server will take it."""

_NO_ALLOCATION = "Failed to allocate"
_TEXT_LIMIT = 256


class Operation(StrEnum):
    """What was asked for, as an operator reads it."""

    READ = "read"
    CREATE = "create"
    EXTEND = "extend"
    DELETE = "delete"
    UPDATE = "update"
    ENCRYPT = "initialise the encryption of"
    ATTACH = "attach"
    DETACH = "detach"


class Meaning(Enum):
    """What an id says to the driver."""

    DONE = auto()
    VOLUME_ABSENT = auto()
    CLIENT_ABSENT = auto()
    VPG_ABSENT = auto()
    EXISTS = auto()
    NO_SPACE = auto()
    BAD_REQUEST = auto()
    UNDER_WAY = auto()
    PENDING = auto()
    FORBIDDEN = auto()
    HELD = auto()
    DENIED = auto()
    TROUBLE = auto()


def _ids(meaning: Meaning, *ids: int) -> dict[int, Meaning]:
    return dict.fromkeys(ids, meaning)


_ALWAYS = {
    **_ids(Meaning.BAD_REQUEST, 422),
    **_ids(Meaning.DENIED, 401),
    **_ids(Meaning.VOLUME_ABSENT, VOLUME_NOT_FOUND),
}

MEANINGS: Mapping[Operation, Mapping[int, Meaning]] = {
    Operation.READ: {
        **_ALWAYS,
        **_ids(Meaning.CLIENT_ABSENT, 1608),
        **_ids(Meaning.VPG_ABSENT, 16220),
    },
    Operation.CREATE: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1663, 1667),
        **_ids(Meaning.EXISTS, 1523),
        **_ids(Meaning.NO_SPACE, 1544),
        **_ids(Meaning.BAD_REQUEST, 1514, 1512, 1513, 1721, 16824, 1552, 1606, 1665, 1161, 1521, 1522),
        **_ids(Meaning.FORBIDDEN, 16825),
        **_ids(Meaning.PENDING, 16358),
    },
    Operation.EXTEND: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1670),
        **_ids(Meaning.VOLUME_ABSENT, 1671),
        **_ids(Meaning.PENDING, 1572, 1581, 1676, 16190, 16358),
        **_ids(Meaning.FORBIDDEN, 1672, NOT_ENOUGH, 1674, 1680, 16825),
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
        # What this volume cannot have, however often it is asked for: its group decides, or it is a snapshot.
        **_ids(Meaning.BAD_REQUEST, 168412, 168413, 1722, 1512, 1513, 1721, 1680),
        **_ids(Meaning.FORBIDDEN, 1603, 1604, 1605, 1564, 1472),
    },
    Operation.ENCRYPT: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 14592),
        # It is initialised, or being initialised, by whomever: the volume's document tells.
        **_ids(Meaning.UNDER_WAY, 16792, 167921, 16794),
        **_ids(Meaning.FORBIDDEN, 16793),
    },
    Operation.ATTACH: {
        **_ALWAYS,
        **_ids(Meaning.DONE, 1611, 16112),
        **_ids(Meaning.VOLUME_ABSENT, 1693),
        **_ids(Meaning.CLIENT_ABSENT, 1621, 1608),
        **_ids(Meaning.HELD, 1716, 1717, 1718),
        **_ids(Meaning.PENDING, 1719, 16303, 11212),
        **_ids(Meaning.FORBIDDEN, 1569, 1607, 1720, 162821),
        **_ids(Meaning.DENIED, 1620),
    },
    Operation.DETACH: {
        **_ALWAYS,
        # "Not there any more" is what was wanted, whoever was first.
        **_ids(Meaning.DONE, 1706, 17061, 162222, 162223, 1622, 1608, VOLUME_NOT_FOUND),
        **_ids(Meaning.PENDING, 16303),
    },
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that carries an error: its ids, innermost first, and what the server says of it."""

    ids: tuple[int, ...]
    text: str
    current_version: int | None = None
    no_allocation: bool = field(default=False)

    @property
    def main_id(self) -> int | None:
        """The outermost id."""
        return self.ids[-1] if self.ids else None


def refusal_in(envelope: Mapping[str, object]) -> Refusal | None:
    """Return the refusal that an envelope carries, None for a plain success.

    A refusal of the level WARNING comes with `success: true`, so the error decides, not the flag.
    """
    error = envelope.get("error")
    if error is None and "systemMessage" in envelope:
        error = envelope
    if error is None:
        return None if envelope.get("success", True) is True else Refusal((), "no reason given")
    if not isinstance(error, dict):
        return Refusal((), _quoted(error))
    links = _links(error)
    inner = error.get("innerMessage")
    return Refusal(
        ids=tuple(number for link in reversed(links) if (number := _id(link)) is not None),
        text=_text(links),
        current_version=next((v for link in links if isinstance(v := link.get("volumeReservation"), int)), None),
        no_allocation=inner == _NO_ALLOCATION,
    )


def meaning_of(operation: Operation, refusal: Refusal) -> tuple[Meaning, int | None]:
    """Return what the refusal means for this operation and the id that says so."""
    table = MEANINGS[operation]
    for number in refusal.ids:
        if number in table:
            return table[number], number
    if operation is Operation.CREATE and refusal.no_allocation and CREATE_FAILED in refusal.ids:
        return Meaning.NO_SPACE, CREATE_FAILED
    return Meaning.TROUBLE, refusal.main_id


def failure_of(
    operation: Operation, refusal: Refusal, *, volume: str = "", client: str = "", vpg: str = ""
) -> DriverError:
    """Return the failure to raise for a refusal; `volume`, `client`, `vpg` name what the request was about."""
    meaning, number = meaning_of(operation, refusal)
    match meaning:
        case Meaning.VOLUME_ABSENT:
            return VolumeNotFound(volume)
        case Meaning.CLIENT_ABSENT:
            return NodeNotFound(client)
        case Meaning.HELD if number is not None:
            return ReservationConflict(volume, number, refusal.current_version)
    subject = _subject(volume, client, vpg)
    family = _FAMILIES.get(meaning, StorageUnavailable)
    return family(f"the management refuses to {operation} {subject}: {refusal.text} (management id {number})")


_FAMILIES: Mapping[Meaning, type[DriverError]] = {
    Meaning.NO_SPACE: Exhausted,
    Meaning.BAD_REQUEST: InvalidRequest,
    Meaning.PENDING: OperationPending,
    Meaning.FORBIDDEN: PreconditionFailed,
    Meaning.DENIED: Denied,
}


def _subject(volume: str, client: str, vpg: str) -> str:
    named = [f"{kind} {shown(name)}" for kind, name in (("volume", volume), ("client", client), ("VPG", vpg)) if name]
    return " on ".join(named) or "the requested object"


def _links(error: dict[str, object]) -> list[dict[str, object]]:
    """Return the error objects from the outermost to the innermost."""
    links: list[dict[str, object]] = []
    link: object = error
    while isinstance(link, dict) and len(links) < 8:
        links.append(link)
        link = link.get("innerMessage")
    return links


def _id(link: dict[str, object]) -> int | None:
    # List errors leak the server's own object, whose id lies one level deeper.
    message = link.get("systemMessage")
    number = message.get("id") if isinstance(message, dict) else link.get("id")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


def _text(links: list[dict[str, object]]) -> str:
    said = [link["message"] for link in links if isinstance(link.get("message"), str)]
    last = links[-1].get("innerMessage")
    if isinstance(last, str):
        said.append(last)
    return _quoted(": ".join(str(text) for text in said)) if said else "no reason given"


def _quoted(text: object) -> str:
    return shown(text, _TEXT_LIMIT)
