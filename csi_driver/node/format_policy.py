# SPDX-License-Identifier: Apache-2.0
"""Decide on the content of a device: use it, format it or refuse. Pure: a table of cases.

Formatting needs proof that nothing is lost. On a first attachment a blank head, tail and superblock locations are
enough; otherwise every block must be zero. A format that this driver left unfinished under this attachment is
repeated, and an administrator can allow one format over old data. A filesystem made by this driver has the UUID of the
volume, or of one from which the volume was copied. docs/data-safety.md has the full argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid5

from csi_driver.host_model import Blank, Content, Filesystem, OtherContent
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.parameters.mount_options import FilesystemRequest
from csi_driver.publish_context import History, PublishContext

ALLOW_FORMAT = "`nvmesh-csi volume allow-format`"

_ONE_FOR_EACH_UUID = "btrfs"
"""Of two devices with one UUID of this filesystem, which have the same device UUID as well, Linux takes the second for
the first under another name (fs/btrfs/volumes.c, device_list_add)."""


@dataclass(frozen=True, slots=True)
class Use:
    """Use the filesystem on the device, with `new_uuid` after that is its UUID.

    `is_ready`: neither a check nor growth is due.
    """

    fs_type: str
    is_ready: bool = False
    new_uuid: str = ""


@dataclass(frozen=True, slots=True)
class Format:
    """Format a device that looks blank, with `prove_every_block` after every block is read."""

    fs_type: str
    prove_every_block: bool


@dataclass(frozen=True, slots=True)
class FormatAgain:
    """Repeat a format that this driver did not finish; the volume was never used."""

    fs_type: str
    found: str = "an unfinished format of this driver"


@dataclass(frozen=True, slots=True)
class FormatOver:
    """Format over the content `found`, as an administrator allowed."""

    fs_type: str
    found: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do nothing. `reason` completes "volume X ..."."""

    reason: str


AnyFormat = Format | FormatAgain | FormatOver
Verdict = Use | AnyFormat | Refuse


@dataclass(frozen=True, slots=True)
class Evidence:
    """Evidence about a volume apart from the content of its device.

    In an attachment without a number neither a first attachment nor a permission counts. `own_uuid`: UUID of a
    filesystem that this driver makes on the volume.
    """

    context: PublishContext
    record: UsageRecord | None = None
    own_uuid: str | None = None

    @property
    def mount_uuid(self) -> str | None:
        """UUID with which a btrfs is mounted: each private copy has one of its own.

        Before Linux 6.7 the kernel remembers an earlier copy on the node that udev showed it, and takes none with its
        UUID and an earlier generation.
        """
        if self.own_uuid is None or not self.context.private_copy:
            return self.own_uuid
        return str(uuid5(UUID(self.own_uuid), f"attachment {self.context.attachment}"))

    @property
    def own_record(self) -> str:
        return self.record.filesystem if self.record is not None and self.record.is_of(self.context.attachment) else ""

    @property
    def was_in_use(self) -> bool:
        """Whether the volume may have been written to under this attachment."""
        return self.own_record in (RAW, USED)

    @property
    def begun(self) -> str:
        """The type of a format that was begun under this attachment; empty for none."""
        return "" if self.was_in_use else self.own_record

    @property
    def is_first(self) -> bool:
        """Whether the volume was certainly never written to."""
        is_new = self.context.history is History.FIRST and not self.context.populated
        return is_new and self.context.attachment > 0 and not self.was_in_use

    @property
    def is_only_ours(self) -> bool:
        """Whether a filesystem on the volume can only be one that this driver made."""
        known = self.context.history in (History.FIRST, History.ATTACHED)
        return known and self.own_uuid is not None and not self.was_in_use

    @property
    def expects_own(self) -> bool:
        """Whether the volume should hold a filesystem of this driver, and no other program can have written to it."""
        uses = {History.FIRST: (USED,), History.ATTACHED: (USED, "")}.get(self.context.history, ())
        return self.context.attachment > 0 and self.own_record in uses

    @property
    def may_format_over(self) -> bool:
        """Whether old data may be destroyed: it is allowed, and the permission was not used yet."""
        return self.context.format_allowed and self.context.attachment > 0 and not self.was_in_use


def decide(content: Content, asked: FilesystemRequest, evidence: Evidence, *, supported: Sequence[str]) -> Verdict:
    """Decide what to do with a device that holds `content`."""
    if evidence.begun:
        verdict = _decide_unfinished(content, asked, evidence)
        if verdict is not None:
            return verdict
    verdict = _decide_by_content(content, asked, evidence, supported)
    if evidence.may_format_over and not asked.read_only and _needs_permission(verdict):
        return FormatOver(asked.to_make, describe(content))
    return verdict


def _needs_permission(verdict: Verdict) -> bool:
    return isinstance(verdict, Refuse) or (isinstance(verdict, Format) and verdict.prove_every_block)


def _decide_unfinished(content: Content, asked: FilesystemRequest, evidence: Evidence) -> Verdict | None:
    """Decide on an unfinished format of this attachment; None where the content alone decides."""
    begun = evidence.begun
    unfinished = f"holds an unfinished {begun} format of this attachment"
    if evidence.may_format_over and not asked.read_only:
        return FormatOver(asked.to_make, f"{describe(content)}, after an unfinished {begun} format")
    match content:
        case Blank() if asked.read_only or asked.to_make != begun:
            return None
        case Filesystem(fs_type=held) if held != begun:
            return Refuse(f"{unfinished}, and now {held}: another program wrote to it")
    if asked.read_only:
        return Refuse(f"{unfinished}: stage it writable first")
    if asked.fs_type not in ("", begun):
        return Refuse(f"{unfinished}; expected {asked.fs_type}")
    return FormatAgain(begun)


def _decide_by_content(
    content: Content, asked: FilesystemRequest, evidence: Evidence, supported: Sequence[str]
) -> Verdict:
    match content:
        case Filesystem():
            return _decide_filesystem(content, asked, evidence, supported)
        case OtherContent(description=description):
            expected = asked.fs_type or "a filesystem"
            return Refuse(f"holds {description}; expected {expected} or a blank device{_way_out(evidence)}")
        case Blank():
            if evidence.own_record == USED:
                return Refuse(
                    "was in use under this attachment and is blank now: its data was lost or erased, so it is not "
                    "formatted; detach and attach it again, and it is formatted if every block is zero"
                )
            if asked.read_only:
                return Refuse("is blank and was never formatted; stage it writable first")
            return Format(asked.to_make, prove_every_block=not evidence.is_first)


def _decide_filesystem(
    content: Filesystem, asked: FilesystemRequest, evidence: Evidence, supported: Sequence[str]
) -> Verdict:
    held = content.fs_type
    if asked.fs_type and held != asked.fs_type:
        return Refuse(f"holds {held}; expected {asked.fs_type}{_way_out(evidence)}")
    if held not in supported:
        return Refuse(f"holds {held}; expected one of {', '.join(supported)}{_way_out(evidence)}")
    if evidence.is_only_ours and content.uuid not in (
        evidence.own_uuid,
        evidence.mount_uuid,
        *evidence.context.inherited_uuids,
    ):
        return Refuse(
            f"holds {describe(content)}, which was not made for it (UUID mismatch: leftover filesystem of another "
            f"volume); to use it, set its UUID to {evidence.own_uuid}{_way_out(evidence)}"
        )
    if held != _ONE_FOR_EACH_UUID or not evidence.context.populated or content.uuid == evidence.mount_uuid:
        return Use(held, content.is_ready)
    if asked.read_only and not evidence.context.private_copy:
        return Refuse(
            f"holds {describe(content)}, as its source may, and Linux cannot use both; stage it writable once: that "
            "gives it a UUID of its own"
        )
    return Use(held, content.is_ready, evidence.mount_uuid or "")


def _way_out(evidence: Evidence) -> str:
    return "" if evidence.was_in_use else f"; to format over it, run {ALLOW_FORMAT} and attach it again"


def describe(content: Content) -> str:
    match content:
        case Filesystem(fs_type=fs_type, uuid=uuid):
            return f"{fs_type} with the uuid {uuid}" if uuid else fs_type
        case OtherContent(description=description):
            return description
        case Blank():
            return "nothing at its head, tail and superblock locations"
