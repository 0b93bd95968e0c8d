# SPDX-License-Identifier: Apache-2.0
"""Usage records as files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.errors import HostFailure, SystemCallFailed
from csi_driver.node.usage_records import RAW, USED, UsageRecord, UsageRecords, earlier_use, record_use

UUID = "0a6f1c1e-9d1b-4b7e-8f6b-3f1d2c5b7a90"


@pytest.fixture
def marks(tmp_path: Path) -> UsageRecords:
    return UsageRecords(tmp_path / "state")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "format-marks"
    path.mkdir()
    return path


def test_a_record_is_read_back_as_written(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 3, "xfs"))
    assert marks.read(UUID) == UsageRecord(UUID, 3, "xfs")


def flushes(marks: UsageRecords, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, UsageRecord | None]]:
    """Return a list that gets the name of each file that is flushed, and the record as it is then."""
    seen: list[tuple[str, UsageRecord | None]] = []

    def noting(flush: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            flush(descriptor)
            seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), marks.read(UUID)))

        return call

    monkeypatch.setattr(os, "fsync", noting(os.fsync))
    monkeypatch.setattr(os, "fdatasync", noting(os.fdatasync))
    return seen


def test_a_record_is_on_disk_when_it_is_written(marks: UsageRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, record = flushes(marks, monkeypatch), UsageRecord(UUID, 3, "xfs")
    marks.write(record)
    assert flushed == [("state", None), (f"{UUID}.draft", None), ("format-marks", record)]


def test_a_record_is_replaced_in_place_with_one_flush(marks: UsageRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    marks.write(UsageRecord(UUID, 3, "xfs"))
    flushed, used, inode = flushes(marks, monkeypatch), UsageRecord(UUID, 3, USED), marks.path_of(UUID).stat().st_ino
    record_use(marks, UUID, 3, USED)
    assert (flushed, marks.path_of(UUID).stat().st_ino) == ([(f"{UUID}.mark", used)], inode)


def test_a_use_whose_flush_failed_is_flushed_when_the_call_is_repeated(
    marks: UsageRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(errno.EIO, "the disk")

    marks.write(UsageRecord(UUID, 3, "xfs"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fail)
        with pytest.raises(SystemCallFailed):
            record_use(marks, UUID, 3, USED)
    flushed, used = flushes(marks, monkeypatch), UsageRecord(UUID, 3, USED)
    assert marks.read(UUID) == used, "in memory already"
    record_use(marks, UUID, 3, USED)
    assert flushed == [(f"{UUID}.mark", used)]


def test_a_record_of_an_earlier_driver_is_read_and_replaced(directory: Path) -> None:
    marks = UsageRecords(directory.parent)
    path = directory / f"{UUID}.mark"
    path.write_text(f'{{"volume": "{UUID}", "attachment": 3, "filesystem": "used", "uncounted": true}}')
    assert marks.read(UUID) == UsageRecord(UUID, 3, USED, uncounted=True)
    with path.open("rb") as held:
        marks.write(UsageRecord(UUID, 4, "ext4"))
        assert os.fstat(held.fileno()).st_nlink == 0, "written in place, longer than it was"
    assert marks.read(UUID) == UsageRecord(UUID, 4, "ext4")


def test_an_earlier_driver_reads_the_record(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 3, "xfs"))
    marks.write(UsageRecord(UUID, 12, USED, root_mode_pending=True))
    fields = json.loads(marks.path_of(UUID).read_text(encoding="utf-8"))
    known = {"volume": UUID, "attachment": 12, "filesystem": "used", "rootModePending": True}
    assert {key: fields[key] for key in known} == known


def test_a_record_takes_one_sector(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 1 << 62, USED, uncounted=True, root_mode_pending=True))
    assert marks.path_of(UUID).stat().st_size == 512


def test_a_record_torn_anywhere_while_it_was_replaced_stops_the_call(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 3, "ext4"))
    before = marks.path_of(UUID).read_bytes()
    marks.write(UsageRecord(UUID, 3, USED))
    after = marks.path_of(UUID).read_bytes()
    torn = {mixed for cut in range(512) for mixed in (before[:cut] + after[cut:], after[:cut] + before[cut:])}
    for content in torn - {before, after}:
        marks.path_of(UUID).write_bytes(content)
        with pytest.raises(HostFailure, match="cannot be read"):
            marks.read(UUID)


def test_a_new_record_replaces_the_old_one(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 3, "xfs"))
    marks.write(UsageRecord(UUID, 4, "ext4"))
    assert marks.read(UUID) == UsageRecord(UUID, 4, "ext4")


def test_a_record_may_be_removed_twice(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 3, "xfs"))
    marks.remove(UUID)
    marks.remove(UUID)
    assert marks.read(UUID) is None


def test_a_volume_without_record_has_none(marks: UsageRecords) -> None:
    assert marks.read(UUID) is None


def test_a_begun_format_applies_to_its_own_attachment() -> None:
    assert [UsageRecord(UUID, 3, "xfs").is_of(attachment) for attachment in (2, 3, 4)] == [False, True, False]


@pytest.mark.parametrize("how", [RAW, USED])
def test_use_applies_to_earlier_attachments_too(how: str) -> None:
    assert [UsageRecord(UUID, 3, how).is_of(attachment) for attachment in (0, 2, 3, 4)] == [False, True, True, False]


def test_use_under_an_uncounted_attachment_keeps_the_earlier_record(marks: UsageRecords) -> None:
    marks.write(UsageRecord(UUID, 3, USED))
    record_use(marks, UUID, 0, USED)
    assert marks.read(UUID) == UsageRecord(UUID, 3, USED, uncounted=True)
    assert earlier_use(marks, UUID, 5) == 0
    record_use(marks, UUID, 5, USED)
    assert marks.read(UUID) == UsageRecord(UUID, 5, USED)
    assert earlier_use(marks, UUID, 7) == 5


def test_a_record_of_an_uncounted_attachment_applies_to_none() -> None:
    assert not UsageRecord(UUID, 0, "xfs").is_of(0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"volume": "x"}', '{"volume":"a","attachment":1,"filesystem":"ext4"}']
)
def test_an_unreadable_record_stops_the_call(directory: Path, text: str) -> None:
    (directory / f"{UUID}.mark").write_text(text)
    with pytest.raises(HostFailure, match=f"{UUID}.mark"):
        UsageRecords(directory.parent).read(UUID)


@pytest.mark.parametrize("draft", [f"{UUID}.new", f"{UUID}.draft"])
def test_a_draft_left_by_a_crash_is_no_record(directory: Path, draft: str) -> None:
    (directory / draft).write_text("{")
    marks = UsageRecords(directory.parent)
    assert marks.read(UUID) is None
    assert marks.recorded() == []
    marks.write(UsageRecord(UUID, 3, "xfs"))
    assert marks.read(UUID) == UsageRecord(UUID, 3, "xfs")


def test_publications_at_once_by_two_drivers_lose_no_use(tmp_path: Path) -> None:
    drivers = [UsageRecords(tmp_path), UsageRecords(tmp_path)]
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(record_use, drivers[n % 2], UUID, n, RAW) for n in [*range(1, 41), *range(40, 0, -1)]]
    assert [call.exception() for call in calls] == [None] * 80
    assert UsageRecords(tmp_path).read(UUID) == UsageRecord(UUID, 40, RAW)


def test_a_record_that_another_driver_changes_is_waited_for(tmp_path: Path) -> None:
    one, other = UsageRecords(tmp_path), UsageRecords(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with one.changing(UUID):
            call = pool.submit(record_use, other, UUID, 5, RAW)
            with pytest.raises(TimeoutError):
                call.result(timeout=0.2)
            one.write(UsageRecord(UUID, 4, USED))
        call.result()
    assert one.read(UUID) == UsageRecord(UUID, 5, RAW)


def test_a_record_that_is_read_while_another_driver_replaces_it_is_read_again(tmp_path: Path) -> None:
    one, other = UsageRecords(tmp_path), UsageRecords(tmp_path)
    one.write(UsageRecord(UUID, 3, "ext4"))
    before = one.path_of(UUID).read_bytes()
    with ThreadPoolExecutor(1) as pool:
        with one.changing(UUID):
            one.write(UsageRecord(UUID, 4, USED))
            after = one.path_of(UUID).read_bytes()
            one.path_of(UUID).write_bytes(after[:80] + before[80:])
            call = pool.submit(other.read, UUID)
            with pytest.raises(TimeoutError):
                call.result(timeout=0.2)
            one.path_of(UUID).write_bytes(after)
        assert call.result() == UsageRecord(UUID, 4, USED)


def test_a_record_of_another_volume_is_not_waited_for(tmp_path: Path) -> None:
    one, other = UsageRecords(tmp_path), UsageRecords(tmp_path)
    with one.changing(UUID):
        other.write(UsageRecord("another", 1, USED))
    assert other.recorded() == ["another"]


def test_records_are_listed_by_age_during_removals(tmp_path: Path) -> None:
    marks = UsageRecords(tmp_path)
    for age in range(300):
        marks.write(UsageRecord(f"uuid-{age}", 1, USED))
        os.utime(marks.path_of(f"uuid-{age}"), (1000 - age, 1000 - age))
    with ThreadPoolExecutor(1) as pool:
        removals = [pool.submit(marks.remove, f"uuid-{age}") for age in range(0, 300, 2)]
        while not removals[-1].done():
            marks.recorded()
    assert marks.recorded() == [f"uuid-{age}" for age in range(299, 0, -2)]


def test_a_new_node_has_no_records(tmp_path: Path) -> None:
    assert UsageRecords(tmp_path / "absent").recorded() == []
