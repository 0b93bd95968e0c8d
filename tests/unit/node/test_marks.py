"""Format marks as files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from csi_driver.errors import HostFailure
from csi_driver.node.marks import RAW, USED, Mark, MarkFiles, put_to_use_before, remember_use

UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"


@pytest.fixture
def marks(tmp_path: Path) -> MarkFiles:
    return MarkFiles(tmp_path / "state" / "format-marks")


def test_a_mark_is_read_back_as_it_was_written(marks: MarkFiles) -> None:
    marks.write(Mark(UUID, 3, "xfs"))
    assert marks.read(UUID) == Mark(UUID, 3, "xfs")


def test_a_new_mark_replaces_the_older_one(marks: MarkFiles) -> None:
    marks.write(Mark(UUID, 3, "xfs"))
    marks.write(Mark(UUID, 4, "ext4"))
    assert marks.read(UUID) == Mark(UUID, 4, "ext4")


def test_a_removed_mark_is_gone_and_may_be_removed_again(marks: MarkFiles) -> None:
    marks.write(Mark(UUID, 3, "xfs"))
    marks.remove(UUID)
    marks.remove(UUID)
    assert marks.read(UUID) is None


def test_without_a_mark_there_is_none_to_read(marks: MarkFiles) -> None:
    assert marks.read(UUID) is None


def test_what_was_begun_was_so_under_its_own_attachment_alone() -> None:
    assert [Mark(UUID, 3, "xfs").is_of(attachment) for attachment in (2, 3, 4)] == [False, True, False]


@pytest.mark.parametrize("how", [RAW, USED])
def test_what_was_used_was_so_for_every_earlier_attachment_too(how: str) -> None:
    assert [Mark(UUID, 3, how).is_of(attachment) for attachment in (0, 2, 3, 4)] == [False, True, True, False]


def test_use_under_an_attachment_that_nobody_counts_forgets_no_earlier_one(marks: MarkFiles) -> None:
    marks.write(Mark(UUID, 3, USED))
    remember_use(marks, UUID, 0, USED)
    assert marks.read(UUID) == Mark(UUID, 3, USED, uncounted=True)
    assert put_to_use_before(marks, UUID, 5) == 0
    remember_use(marks, UUID, 5, USED)
    assert marks.read(UUID) == Mark(UUID, 5, USED)
    assert put_to_use_before(marks, UUID, 7) == 5


def test_a_mark_of_an_attachment_that_nobody_counts_is_of_none() -> None:
    assert not Mark(UUID, 0, "xfs").is_of(0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"volume": "x"}', '{"volume":"a","attachment":1,"filesystem":"ext4"}']
)
def test_a_mark_that_cannot_be_read_stops_everything(tmp_path: Path, text: str) -> None:
    (tmp_path / f"{UUID}.mark").write_text(text)
    with pytest.raises(HostFailure, match="format mark"):
        MarkFiles(tmp_path).read(UUID)


def test_a_draft_left_by_a_crash_is_no_mark(tmp_path: Path) -> None:
    (tmp_path / f"{UUID}.new").write_text("{")
    assert MarkFiles(tmp_path).read(UUID) is None


def test_only_the_newest_marks_are_kept_and_none_of_a_format_that_was_begun_goes(tmp_path: Path) -> None:
    marks = MarkFiles(tmp_path, most_kept=2)
    words = [USED, "ext4", RAW, USED, "used by nobody", USED, RAW]
    for age, word in enumerate(reversed(words)):
        marks.write(Mark(f"uuid-{word}-{age}", 1, word))
        os.utime(tmp_path / f"uuid-{word}-{age}.mark", (1000 - age, 1000 - age))
    (tmp_path / "torn.mark").write_text("{")
    os.utime(tmp_path / "torn.mark", (1, 1))
    marks.forget_oldest()
    kept = sorted(path.stem for path in tmp_path.glob("*.mark"))
    assert kept == ["torn", "uuid-ext4-5", "uuid-raw-0", "uuid-used by nobody-2", "uuid-used-1"]


def test_nothing_to_forget_is_no_failure(tmp_path: Path) -> None:
    MarkFiles(tmp_path / "absent").forget_oldest()
