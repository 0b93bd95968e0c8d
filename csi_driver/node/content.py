"""What may be done with what a device holds. Pure: no device is touched here, and every case is one row of a table.

The argument, in short: formatting destroys, so it needs a proof that there is nothing to destroy. A volume that
was never attached before proves it by its head, tail and superblock places; any other must be zero in every
block. The one exception is what our own mkfs left unfinished under this very attachment (see `marks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csi_driver.handover import History
from csi_driver.machine import Blank, Content, Filesystem, OtherContent
from csi_driver.model import DEFAULT_FS_TYPE
from csi_driver.node.marks import RAW, Mark


@dataclass(frozen=True, slots=True)
class Use:
    """The device holds the filesystem; it is used as it is."""

    fs_type: str


@dataclass(frozen=True, slots=True)
class Format:
    """The device looks blank. With `prove_every_block` it must be read whole, and be zero, before it is formatted."""

    fs_type: str
    prove_every_block: bool


@dataclass(frozen=True, slots=True)
class FormatAgain:
    """The device holds what our own format left unfinished; nobody has ever used it."""

    fs_type: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing may be done; `reason` completes "volume X ..."."""

    reason: str


Verdict = Use | Format | FormatAgain | Refuse


@dataclass(frozen=True, slots=True)
class Wish:
    """What the request asks for. An empty `fs_type` leaves the choice: what is there, else the default."""

    fs_type: str
    read_only: bool

    @property
    def to_make(self) -> str:
        return self.fs_type or DEFAULT_FS_TYPE


def decide(
    content: Content, wish: Wish, *, history: History, attachment: int, mark: Mark | None, supported: Sequence[str]
) -> Verdict:
    """Decide what to do with a device that holds `content`.

    `mark` is the volume's, of whatever attachment; `attachment` numbers the present one, 0 where nobody counts.
    """
    ours = mark if mark is not None and mark.is_of(attachment) else None
    if ours is not None and ours.filesystem != RAW:
        verdict = _unfinished(content, wish, ours)
        if verdict is not None:
            return verdict
    match content:
        case Filesystem(fs_type=held):
            return _held(held, wish, supported)
        case OtherContent(description=description):
            return Refuse(f"holds {description}, wanted {wish.fs_type or 'a filesystem'} or a blank device")
        case Blank():
            if wish.read_only:
                return Refuse("is blank and is to be used read-only: it was never formatted")
            was_raw = ours is not None and ours.filesystem == RAW
            return Format(wish.to_make, prove_every_block=history is not History.FIRST or was_raw)


def _unfinished(content: Content, wish: Wish, mark: Mark) -> Verdict | None:
    """Decide by a format mark of this very attachment; None when the content alone decides."""
    begun = f"holds a format as {mark.filesystem} that was begun under this attachment and not finished"
    match content:
        case Blank() if wish.read_only or wish.to_make != mark.filesystem:
            return None
        case Filesystem(fs_type=held) if held != mark.filesystem:
            return Refuse(f"{begun}, and now {held}: somebody else wrote to it")
    if wish.read_only:
        return Refuse(f"{begun}: it must be staged writable first")
    if wish.fs_type not in ("", mark.filesystem):
        return Refuse(f"{begun}, wanted {wish.fs_type}")
    return FormatAgain(mark.filesystem)


def _held(held: str, wish: Wish, supported: Sequence[str]) -> Verdict:
    if wish.fs_type and held != wish.fs_type:
        return Refuse(f"holds {held}, wanted {wish.fs_type}")
    if held not in supported:
        return Refuse(f"holds {held}, wanted one of {', '.join(supported)}")
    return Use(held)
