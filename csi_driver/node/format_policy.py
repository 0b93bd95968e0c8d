"""What may be done with what a device holds. Pure: no device is touched here, and every case is one row of a table.

The argument, in full in docs/data-safety.md: formatting destroys, so it needs a proof that there is nothing to
destroy. A volume that was never attached before proves it by its head, tail and superblock places; any other must be
zero in every block. What our own mkfs left unfinished under this very attachment is made again (see `marks`), and
what an administrator allowed to be formatted over is, once.

A filesystem of ours is known by its uuid, which is the volume's own: where nobody else can have made one, any other
is old data of another volume on reused space, and is not handed to whom it does not belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from csi_driver.host_model import Blank, Content, Filesystem, OtherContent
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.parameters.mount_options import FilesystemRequest
from csi_driver.publish_context import History

ALLOW_FORMAT = "`nvmesh-csi volume allow-format`"
"""How an administrator lets old data be formatted over."""


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
class FormatOver:
    """An administrator allowed what is there, `found`, to be formatted over."""

    fs_type: str
    found: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Nothing may be done; `reason` completes "volume X ..."."""

    reason: str


Verdict = Use | Format | FormatAgain | FormatOver | Refuse


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a volume besides what its device holds.

    `attachment` numbers the present one; 0 where nobody counts, and then neither a first attachment nor a permission
    means anything, because nothing tells it from the next one. `mark` is the volume's, of whatever attachment.
    `own_uuid` is that of a filesystem made by us on this volume.
    """

    history: History
    attachment: int
    mark: UsageRecord | None = None
    own_uuid: str | None = None
    format_allowed: bool = False

    @property
    def own_mark(self) -> str:
        """What the mark of this very attachment says; empty without one."""
        return self.mark.filesystem if self.mark is not None and self.mark.is_of(self.attachment) else ""

    @property
    def was_handed_out(self) -> bool:
        """Whether somebody may have written to the device under this very attachment."""
        return self.own_mark in (RAW, USED)

    @property
    def begun(self) -> str:
        """The filesystem of a format that was begun under this attachment and not finished; empty for none."""
        return "" if self.was_handed_out else self.own_mark

    @property
    def is_first(self) -> bool:
        """Whether nobody can have written to the device before."""
        return self.history is History.FIRST and self.attachment > 0 and not self.was_handed_out

    @property
    def is_only_ours(self) -> bool:
        """Whether no filesystem can be there for a good reason but one that this driver made."""
        known = self.history in (History.FIRST, History.ATTACHED)
        return known and self.own_uuid is not None and not self.was_handed_out

    @property
    def may_format_over(self) -> bool:
        """Whether old data may go: allowed, countable as once, and nothing was written since it was allowed."""
        return self.format_allowed and self.attachment > 0 and not self.was_handed_out


def decide(content: Content, wish: FilesystemRequest, evidence: Evidence, *, supported: Sequence[str]) -> Verdict:
    """Decide what to do with a device that holds `content`."""
    if evidence.begun:
        verdict = _unfinished(content, wish, evidence)
        if verdict is not None:
            return verdict
    verdict = _by_content(content, wish, evidence, supported)
    if evidence.may_format_over and not wish.read_only and _needs_permission(verdict):
        return FormatOver(wish.to_make, _described(content))
    return verdict


def _needs_permission(verdict: Verdict) -> bool:
    return isinstance(verdict, Refuse) or (isinstance(verdict, Format) and verdict.prove_every_block)


def _unfinished(content: Content, wish: FilesystemRequest, evidence: Evidence) -> Verdict | None:
    """Decide by a format mark of this very attachment; None when the content alone decides."""
    begun = evidence.begun
    said = f"holds an unfinished {begun} format of this attachment"
    if evidence.may_format_over and not wish.read_only:
        return FormatOver(wish.to_make, f"{_described(content)}, after a format as {begun} that was not finished")
    match content:
        case Blank() if wish.read_only or wish.to_make != begun:
            return None
        case Filesystem(fs_type=held) if held != begun:
            return Refuse(f"{said}, and now {held}: another program wrote to it")
    if wish.read_only:
        return Refuse(f"{said}: it must be staged writable first")
    if wish.fs_type not in ("", begun):
        return Refuse(f"{said}; expected {wish.fs_type}")
    return FormatAgain(begun)


def _by_content(content: Content, wish: FilesystemRequest, evidence: Evidence, supported: Sequence[str]) -> Verdict:
    match content:
        case Filesystem():
            return _held(content, wish, evidence, supported)
        case OtherContent(description=description):
            wanted = wish.fs_type or "a filesystem"
            return Refuse(f"holds {description}; expected {wanted} or a blank device{_way_out(evidence)}")
        case Blank():
            if evidence.own_mark == USED:
                return Refuse(
                    "was in use under this attachment and is blank now: its data was lost or erased, and it is not "
                    "formatted; detach and attach it again, and it is formatted if every block is zero"
                )
            if wish.read_only:
                return Refuse("is blank and to be used read-only: it was never formatted; stage it writable first")
            return Format(wish.to_make, prove_every_block=not evidence.is_first)


def _held(content: Filesystem, wish: FilesystemRequest, evidence: Evidence, supported: Sequence[str]) -> Verdict:
    held = content.fs_type
    if wish.fs_type and held != wish.fs_type:
        return Refuse(f"holds {held}; expected {wish.fs_type}{_way_out(evidence)}")
    if held not in supported:
        return Refuse(f"holds {held}; expected one of {', '.join(supported)}{_way_out(evidence)}")
    if evidence.is_only_ours and content.uuid != evidence.own_uuid:
        return Refuse(
            f"holds {_described(content)}, which was not made for it (UUID mismatch: leftover filesystem of another "
            f"volume); to use it, set its UUID to {evidence.own_uuid}{_way_out(evidence)}"
        )
    return Use(held)


def _way_out(evidence: Evidence) -> str:
    return "" if evidence.was_handed_out else f"; to format over it, run {ALLOW_FORMAT} and attach it again"


def _described(content: Content) -> str:
    match content:
        case Filesystem(fs_type=fs_type, uuid=uuid):
            return f"{fs_type} with the uuid {uuid}" if uuid else fs_type
        case OtherContent(description=description):
            return description
        case Blank():
            return "nothing at its head, tail and superblock places"
