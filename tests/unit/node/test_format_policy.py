# SPDX-License-Identifier: Apache-2.0
"""The format policy, case by case."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from csi_driver.host_model import Blank, Content, Filesystem, OtherContent
from csi_driver.node.format_policy import Evidence, Format, FormatAgain, FormatOver, Refuse, Use, Verdict, decide
from csi_driver.node.usage_records import RAW, USED, UsageRecord
from csi_driver.parameters.mount_options import FilesystemRequest
from csi_driver.publish_context import History, PublishContext

SUPPORTED = ("ext4", "xfs", "btrfs")
UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"
FOREIGN = "77777777-9d1b-4b7e-8f6b-3f1d2c5b7a90"

CONTENTS: tuple[Content, ...] = (
    Blank(),
    Filesystem("ext4", UUID),
    Filesystem("ext4", FOREIGN),
    Filesystem("xfs", UUID),
    Filesystem("ntfs", "0123456789ABCDEF"),
    OtherContent("a partition table"),
)
WISHES = [FilesystemRequest(fs, read_only) for fs in ("", "ext4", "xfs", "btrfs") for read_only in (False, True)]
ATTACHMENTS = (0, 1, 7)
MARKS = (
    None,
    *(UsageRecord(UUID, number, word) for number in ATTACHMENTS for word in ("ext4", "xfs", "btrfs", RAW, USED)),
)


class Case(NamedTuple):
    """One question to `decide`."""

    content: Content
    wish: FilesystemRequest
    history: History
    attachment: int
    mark: UsageRecord | None
    own_uuid: str | None
    allowed: bool

    def verdict(self) -> Verdict:
        context = PublishContext("csi-1", "", self.attachment, self.history, format_allowed=self.allowed)
        evidence = Evidence(context, self.mark, self.own_uuid)
        return decide(self.content, self.wish, evidence, supported=SUPPORTED)

    @property
    def own_mark(self) -> str | None:
        """State in the record that applies to this attachment, independently of the code."""
        if self.mark is None or self.attachment == 0 or self.mark.attachment < self.attachment:
            return None
        if self.mark.attachment > self.attachment and self.mark.filesystem not in ("raw", "used"):
            return None
        return self.mark.filesystem

    @property
    def held(self) -> str:
        return self.content.fs_type if isinstance(self.content, Filesystem) else ""


def every_case() -> Iterator[Case]:
    parts = (CONTENTS, WISHES, History, ATTACHMENTS, MARKS, (UUID, None), (False, True))
    return itertools.starmap(Case, itertools.product(*parts))


def expected(case: Case) -> tuple[str, str, bool]:
    """The whole table in another form: kind of verdict, filesystem, whether every block is to be proven."""
    refused = ("Refuse", "", False)
    own = case.own_mark
    touched = own in (RAW, USED)
    permitted = case.allowed and case.attachment != 0 and not touched and not case.wish.read_only
    to_make = case.wish.fs_type or "ext4"
    if own is not None and not touched:
        return unfinished(case, own, permitted=permitted)
    if case.held:
        fits = case.held in SUPPORTED and case.wish.fs_type in ("", case.held)
        made_by_others = isinstance(case.content, Filesystem) and case.content.uuid != UUID
        strange = case.history in (History.FIRST, History.ATTACHED) and made_by_others and case.own_uuid and not touched
        if fits and not strange:
            return ("Use", case.held, False)
        return ("FormatOver", to_make, False) if permitted else refused
    if isinstance(case.content, OtherContent):
        return ("FormatOver", to_make, False) if permitted else refused
    return blank(case, own, permitted=permitted)


def blank(case: Case, own: str | None, *, permitted: bool) -> tuple[str, str, bool]:
    if own == USED or case.wish.read_only:
        return ("Refuse", "", False)
    to_make = case.wish.fs_type or "ext4"
    if case.history is History.FIRST and case.attachment != 0 and own is None:
        return ("Format", to_make, False)
    return ("FormatOver", to_make, False) if permitted else ("Format", to_make, True)


def unfinished(case: Case, begun: str, *, permitted: bool) -> tuple[str, str, bool]:
    to_make = case.wish.fs_type or "ext4"
    if permitted:
        return ("FormatOver", to_make, False)
    if case.wish.read_only:
        return ("Refuse", "", False)
    if isinstance(case.content, Blank):
        fresh = case.history is History.FIRST
        return ("FormatAgain", begun, False) if to_make == begun else ("Format", to_make, not fresh)
    mine = isinstance(case.content, OtherContent) or case.held == begun
    return ("FormatAgain", begun, False) if mine and case.wish.fs_type in ("", begun) else ("Refuse", "", False)


def test_every_combination_gives_the_verdict_of_the_table() -> None:
    count = 0
    for case in every_case():
        verdict = case.verdict()
        fs_type = "" if isinstance(verdict, Refuse) else verdict.fs_type
        prove = isinstance(verdict, Format) and verdict.prove_every_block
        assert (type(verdict).__name__, fs_type, prove) == expected(case), case
        count += 1
    assert count > 30_000


def test_a_filesystem_is_expected_to_be_the_volumes_own_only_where_nobody_else_wrote() -> None:
    found = {
        (case.history, case.own_mark)
        for case in every_case()
        if Evidence(PublishContext("csi-1", "", case.attachment, case.history), case.mark).expects_own
    }
    assert found == {(History.FIRST, USED), (History.ATTACHED, USED), (History.ATTACHED, None)}
    assert not any(Evidence(PublishContext("csi-1", "", 0, history)).expects_own for history in History)


def test_content_is_formatted_only_under_a_record_of_this_attachment_or_a_permission() -> None:
    for case in every_case():
        if not isinstance(case.content, Blank) and isinstance(case.verdict(), Format | FormatAgain | FormatOver):
            assert case.allowed or case.own_mark not in (None, RAW, USED), case


def test_reading_never_formats() -> None:
    for case in every_case():
        if case.wish.read_only:
            assert isinstance(case.verdict(), Use | Refuse), case


def test_a_blank_head_and_tail_suffice_only_for_a_first_attachment() -> None:
    for case in every_case():
        verdict = case.verdict()
        if isinstance(verdict, Format) and not verdict.prove_every_block:
            assert case.history is History.FIRST, case
            assert case.attachment > 0, case


def test_content_in_use_under_this_attachment_is_never_formatted() -> None:
    for case in every_case():
        verdict = case.verdict()
        if case.own_mark == USED:
            assert isinstance(verdict, Use | Refuse), case
        if case.own_mark == RAW:
            assert isinstance(verdict, Use | Refuse) or verdict == Format(verdict.fs_type, True), case


def test_a_permission_never_formats_what_can_be_used_as_it_is() -> None:
    for case in every_case():
        without = case._replace(allowed=False).verdict()
        if isinstance(without, Use):
            assert case._replace(allowed=True).verdict() == without, case


def test_a_permission_of_an_uncounted_attachment_permits_nothing() -> None:
    for case in every_case():
        if case.attachment == 0:
            assert case._replace(allowed=True).verdict() == case._replace(allowed=False).verdict(), case


@pytest.mark.parametrize("history", [History.FIRST, History.ATTACHED])
def test_a_filesystem_of_another_uuid_on_a_volume_of_ours_is_not_handed_out(history: History) -> None:
    case = Case(Filesystem("ext4", FOREIGN), FilesystemRequest("ext4", read_only=False), history, 1, None, UUID, False)
    verdict = case.verdict()
    assert isinstance(verdict, Refuse)
    assert (FOREIGN in verdict.reason, UUID in verdict.reason, "allow-format" in verdict.reason) == (True, True, True)


@pytest.mark.parametrize("history", [History.WRITTEN, History.UNKNOWN])
def test_a_filesystem_that_others_may_have_made_for_a_reason_is_used(history: History) -> None:
    case = Case(Filesystem("ext4", FOREIGN), FilesystemRequest("ext4", read_only=False), history, 1, None, UUID, False)
    assert case.verdict() == Use("ext4")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Filesystem("ntfs"), "ntfs"),
        (Filesystem("xfs"), "xfs"),
        (OtherContent("a LUKS header"), "a LUKS header"),
        (OtherContent("a partition table (gpt)"), "gpt"),
    ],
)
def test_a_refusal_says_what_was_found(content: Content, said: str) -> None:
    verdict = Case(content, FilesystemRequest("ext4", read_only=False), History.FIRST, 1, None, UUID, False).verdict()
    assert isinstance(verdict, Refuse)
    assert said in verdict.reason
