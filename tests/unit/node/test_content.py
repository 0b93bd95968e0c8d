"""The decision about a device's content, case by case."""

from __future__ import annotations

import itertools

import pytest

from csi_driver.handover import History
from csi_driver.machine import Blank, Content, Filesystem, OtherContent
from csi_driver.node.content import Format, FormatAgain, Refuse, Use, Verdict, Wish, decide
from csi_driver.node.marks import RAW, Mark

SUPPORTED = ("ext4", "xfs", "btrfs")
UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"

CONTENTS: tuple[Content, ...] = (
    Blank(),
    Filesystem("ext4"),
    Filesystem("xfs"),
    Filesystem("ntfs"),
    OtherContent("a partition table"),
)
WISHES = [Wish(fs_type, read_only) for fs_type in ("", "ext4", "xfs", "btrfs") for read_only in (False, True)]
ATTACHMENTS = (0, 1, 7)
MARKS = (
    None,
    *(Mark(UUID, attachment, filesystem) for attachment in (0, 1, 7) for filesystem in ("ext4", "xfs", "btrfs", RAW)),
)
EVERY_CASE = list(itertools.product(CONTENTS, WISHES, History, ATTACHMENTS, MARKS))


def verdict_of(case: tuple[Content, Wish, History, int, Mark | None]) -> Verdict:
    content, wish, history, attachment, mark = case
    return decide(content, wish, history=history, attachment=attachment, mark=mark, supported=SUPPORTED)


def own_mark(mark: Mark | None, attachment: int) -> str | None:
    """The filesystem of a mark of this very attachment, written out independently of the code."""
    if mark is None or attachment == 0 or mark.attachment != attachment:
        return None
    return mark.filesystem


def expected(case: tuple[Content, Wish, History, int, Mark | None]) -> tuple[str, str, bool]:
    """The whole table in another form: kind of verdict, filesystem, whether every block is to be proven."""
    content, wish, history, attachment, mark = case
    own = own_mark(mark, attachment)
    begun = own if own != RAW else None
    held = content.fs_type if isinstance(content, Filesystem) else ""
    kind = type(content).__name__
    fresh = history is History.FIRST and own != RAW
    to_make = wish.fs_type or "ext4"
    if kind == "Blank":
        if wish.read_only:
            return ("Refuse", "", False)
        if begun == to_make:
            return ("FormatAgain", begun, False)
        return ("Format", to_make, not fresh)
    if begun is not None:
        mine = kind == "OtherContent" or held == begun
        wanted = wish.fs_type in ("", begun)
        return ("FormatAgain", begun, False) if mine and wanted and not wish.read_only else ("Refuse", "", False)
    usable = held in SUPPORTED and wish.fs_type in ("", held)
    return ("Use", held, False) if kind == "Filesystem" and usable else ("Refuse", "", False)


def test_every_combination_gives_the_verdict_of_the_table() -> None:
    assert len(EVERY_CASE) > 4000
    for case in EVERY_CASE:
        verdict = verdict_of(case)
        fs_type = "" if isinstance(verdict, Refuse) else verdict.fs_type
        prove = isinstance(verdict, Format) and verdict.prove_every_block
        assert (type(verdict).__name__, fs_type, prove) == expected(case), case


def test_content_is_formatted_only_under_a_mark_of_this_very_attachment() -> None:
    for case in EVERY_CASE:
        content, _, _, attachment, mark = case
        if not isinstance(content, Blank) and isinstance(verdict_of(case), Format | FormatAgain):
            assert own_mark(mark, attachment) not in (None, RAW), case


def test_reading_never_formats() -> None:
    for case in EVERY_CASE:
        if case[1].read_only:
            assert isinstance(verdict_of(case), Use | Refuse), case


def test_a_blank_head_and_tail_suffice_only_for_a_first_attachment() -> None:
    for case in EVERY_CASE:
        verdict = verdict_of(case)
        if isinstance(verdict, Format) and not verdict.prove_every_block:
            assert case[2] is History.FIRST, case


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
    wish = Wish("ext4", read_only=False)
    verdict = decide(content, wish, history=History.FIRST, attachment=1, mark=None, supported=SUPPORTED)
    assert isinstance(verdict, Refuse)
    assert said in verdict.reason
