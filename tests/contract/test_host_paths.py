# SPDX-License-Identifier: Apache-2.0
"""Target and staging paths on a real filesystem."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_driver.errors import InvalidField, PreconditionFailed, SystemCallFailed
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.model import MIB
from tests.contract.host_machine import host_machine, mounts_below, shell


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a path root."""
    made = tmp_path / "root"
    made.mkdir()
    return made


@pytest.fixture
def paths(root: Path) -> LinuxPaths:
    return LinuxPaths([root])


@pytest.fixture
def mounted(root: Path) -> Iterator[Path]:
    """Give a mount point below the root."""
    point = root / "mounted"
    point.mkdir()
    shell("mount", "-t", "tmpfs", "none", str(point))
    yield point
    for left in mounts_below(root):
        shell("umount", "--lazy", left)


# --- checking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "with space", "line\nbreak", "ünïcode", "-flag", "a/b/c", "..."])
def test_every_plain_path_below_the_root_is_accepted(paths: LinuxPaths, root: Path, name: str) -> None:
    assert paths.check(f"{root}/{name}", "target_path") == root / name


@pytest.mark.parametrize(
    "text",
    ["", "relative", "{root}", "{root}/", "{root}/../x", "{root}/a/../../x", "{root}x", "/etc", "{root}/a\0b", "/"],
)
def test_other_paths_are_refused_with_the_field(paths: LinuxPaths, root: Path, text: str) -> None:
    with pytest.raises(InvalidField, match="target_path"):
        paths.check(text.format(root=root), "target_path")


def test_a_path_that_is_too_long_is_refused(paths: LinuxPaths, root: Path) -> None:
    for text in (f"{root}/{'a/' * 3000}", f"{root}/{'a' * 300}", f"{root}/{'a' * 100_000}"):
        with pytest.raises(InvalidField):
            paths.check(text, "target_path")


def test_a_root_that_is_a_link_accepts_both_paths(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    paths = LinuxPaths([link])
    assert paths.check(f"{link}/a", "target_path") == paths.check(f"{real}/a", "target_path") == real / "a"


@pytest.mark.parametrize("name", ["link", "link/below"])
def test_a_link_below_the_root_is_refused(paths: LinuxPaths, root: Path, name: str) -> None:
    outside = root.parent / "outside"
    (outside / "below").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    with pytest.raises(InvalidField, match="symbolic links"):
        paths.check(f"{root}/{name}", "target_path")


def test_a_link_out_of_the_roots_is_named_with_its_target_and_a_fix(paths: LinuxPaths, root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "pods").symlink_to(outside)
    for takes_off in (False, True):
        with pytest.raises(InvalidField) as refused:
            paths.check(f"{root}/pods/1/mount", "target_path", takes_off=takes_off)
        said = str(refused.value)
        assert f"{root / 'pods'} is a link to {outside}" in said
        assert "--path-root" in said


def test_a_link_to_a_directory_below_another_root_is_followed(root: Path) -> None:
    disk = root.parent / "disk"
    (disk / "1").mkdir(parents=True)
    (root / "pods").symlink_to(disk)
    for roots in ([root, disk], [disk, root], [root, root / "pods"]):
        assert LinuxPaths(roots).check(f"{root}/pods/1/mount", "target_path") == disk / "1/mount"


@pytest.mark.parametrize("end", ["mount", "absent"])
def test_a_link_within_a_root_is_followed_only_to_unmount(paths: LinuxPaths, root: Path, end: str) -> None:
    (root / "disk/1/mount").mkdir(parents=True)
    (root / "pods").symlink_to(root / "disk")
    with pytest.raises(InvalidField, match="symbolic links"):
        paths.check(f"{root}/pods/1/{end}", "target_path")
    assert paths.check(f"{root}/pods/1/{end}", "target_path", takes_off=True) == root / "disk/1" / end


def test_a_link_at_the_end_of_a_path_is_never_followed(paths: LinuxPaths, root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "mount").symlink_to(root / "elsewhere")
    (root / "loop").symlink_to(root / "loop")
    for name in ("mount", "loop", "loop/mount"):
        with pytest.raises(InvalidField, match="symbolic links"):
            paths.check(f"{root}/{name}", "target_path", takes_off=True)


# --- looking ----------------------------------------------------------------------------------------------------


def test_the_kind_of_a_path_is_returned(paths: LinuxPaths, root: Path) -> None:
    (root / "directory").mkdir()
    (root / "file").touch()
    (root / "link").symlink_to("/etc")
    os.mkfifo(root / "fifo")
    kinds = [paths.kind(root / name) for name in ("directory", "file", "link", "fifo", "absent", "file/below")]
    assert kinds == ["directory", "file", "other", "other", "absent", "absent"]


# --- making -----------------------------------------------------------------------------------------------------


def test_directories_and_files_are_created_or_exist(paths: LinuxPaths, root: Path) -> None:
    for _ in range(2):
        paths.make_directory(root / "directory")
        paths.make_file(root / "file")
    assert (root / "directory").is_dir()
    assert (root / "file").read_bytes() == b""


def test_a_file_with_content_stays_as_it_is(paths: LinuxPaths, root: Path) -> None:
    (root / "file").write_text("data")
    paths.make_file(root / "file")
    assert (root / "file").read_text() == "data"


def test_another_kind_of_file_is_refused(paths: LinuxPaths, root: Path) -> None:
    (root / "directory").mkdir()
    (root / "file").touch()
    with pytest.raises(PreconditionFailed, match="expected a directory"):
        paths.make_directory(root / "file")
    with pytest.raises(PreconditionFailed, match="expected a file"):
        paths.make_file(root / "directory")


def test_the_mode_is_not_changed_through_a_link(paths: LinuxPaths, root: Path) -> None:
    (root / "a").mkdir(mode=0o755)
    (root / "link").symlink_to("a")
    paths.set_mode(root / "a", 0o2770)
    with pytest.raises(SystemCallFailed):
        paths.set_mode(root / "link", 0o777)
    assert (root / "a").stat().st_mode & 0o7777 == 0o2770


def test_parents_are_not_created(paths: LinuxPaths, root: Path) -> None:
    with pytest.raises(PreconditionFailed, match="absent"):
        paths.make_directory(root / "absent" / "directory")


def test_nothing_is_created_through_a_link_or_outside_the_root(paths: LinuxPaths, root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    for path in (root / "link" / "new", outside / "new", root / ".." / "outside" / "new"):
        with pytest.raises(PreconditionFailed):
            paths.make_directory(path)
        with pytest.raises(PreconditionFailed):
            paths.make_file(path)
    assert not list(outside.iterdir())


# --- removing ---------------------------------------------------------------------------------------------------


def test_an_empty_directory_or_file_is_removed_or_absent(paths: LinuxPaths, root: Path) -> None:
    (root / "directory").mkdir()
    (root / "file").touch()
    for _ in range(2):
        paths.remove(root / "directory")
        paths.remove(root / "file")
    paths.remove(root / "absent" / "below")
    assert not list(root.iterdir())


def test_a_directory_or_file_that_holds_data_is_never_removed(paths: LinuxPaths, root: Path) -> None:
    (root / "directory").mkdir()
    (root / "directory" / "data").touch()
    (root / "file").write_text("data")
    for name in ("directory", "file"):
        with pytest.raises(PreconditionFailed, match="empty"):
            paths.remove(root / name)
    assert (root / "directory" / "data").exists()
    assert (root / "file").read_text() == "data"


def test_the_entries_of_a_directory_are_counted_and_named(paths: LinuxPaths, root: Path) -> None:
    (root / "target").mkdir()
    for name in ("z.log", "late.log"):
        (root / "target" / name).touch()
    with pytest.raises(PreconditionFailed, match=r"is not empty: 2 entries, the first 'late\.log', .* move them away"):
        paths.remove(root / "target")


def test_a_link_is_neither_followed_nor_removed(paths: LinuxPaths, root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    (root / "link").symlink_to(outside)
    with pytest.raises(PreconditionFailed):
        paths.remove(root / "link")
    with pytest.raises(PreconditionFailed):
        paths.remove(root / "link" / "directory")
    assert (root / "link").is_symlink()
    assert outside.is_dir()


@pytest.mark.root
def test_a_mount_point_is_never_removed(paths: LinuxPaths, mounted: Path) -> None:
    with pytest.raises(PreconditionFailed, match="mount point"):
        paths.remove(mounted)
    assert mounted.is_mount()


@pytest.mark.root
def test_a_device_bound_onto_a_file_is_never_removed(paths: LinuxPaths, root: Path, tmp_path: Path) -> None:
    (tmp_path / "machine").mkdir()
    with host_machine(tmp_path / "machine") as machine:
        device = machine.device(machine.volume(size_bytes=MIB))
        target = root / "node"
        paths.make_file(target)
        LinuxMounts(paths.open).bind(device.path, target, read_only=False)
        kind = paths.kind(target)
        paths.make_file(target)
        with pytest.raises(PreconditionFailed):
            paths.remove(target)
        LinuxMounts().unmount(target)
        paths.remove(target)
    assert kind == "device"
    assert not target.exists()


@pytest.mark.root
def test_nothing_is_mounted_through_a_link(paths: LinuxPaths, root: Path) -> None:
    outside = root.parent / "outside"
    (outside / "target").mkdir(parents=True)
    (root / "link").symlink_to(outside)
    with pytest.raises(SystemCallFailed, match="ELOOP"):
        LinuxMounts(paths.open).bind(root, root / "link" / "target", read_only=False)
    assert not mounts_below(outside)


@pytest.mark.root
def test_nothing_is_bound_or_unmounted_through_a_link(paths: LinuxPaths, root: Path, mounted: Path) -> None:
    link, target = root / "link", root / "bound"
    target.mkdir()
    link.symlink_to(mounted.parent)
    mounts = LinuxMounts(paths.open)
    with pytest.raises(SystemCallFailed, match="ELOOP"):
        mounts.bind(link / mounted.name, target, read_only=False)
    with pytest.raises(SystemCallFailed, match="ELOOP"):
        mounts.unmount(link / mounted.name)
    assert str(mounted) in mounts_below(mounted)


@pytest.mark.root
def test_mounts_in_a_root_are_unmounted_and_none_outside(
    paths: LinuxPaths, root: Path, mounted: Path, tmp_path: Path
) -> None:
    mounts = LinuxMounts(paths.open)
    mounts.unmount(root / "nothing" / "there")
    with pytest.raises(PreconditionFailed, match="below no path root"):
        mounts.unmount(tmp_path / "elsewhere" / "target")
    mounts.unmount(mounted)
    assert mounts_below(mounted) == []
