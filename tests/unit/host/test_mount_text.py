# SPDX-License-Identifier: Apache-2.0
"""The mount table's text, and the sorting of mount options."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import InvalidField
from csi_driver.host import mount_options, mount_table, syscalls
from csi_driver.host_model import DeviceNumber

# Lines as Linux 6.1 prints them.
TABLE = r"""22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw,discard,errors=remount-ro
90 22 7:5 / /var/lib/kubelet/a\040b\011c\012d\134e rw,noatime shared:31 master:2 - ext4 /dev/nvmesh/csi-1 ro,stripe=32
91 22 0:5 /nvmesh/csi-2 /target ro,nosuid,noexec,relatime - devtmpfs devtmpfs rw,size=4096k,mode=755
92 22 0:40 / /multi rw - btrfs /dev/nvmesh/csi-3 rw,space_cache=v2,subvolid=5,subvol=/
93 22 7:6 / /target rw - xfs /dev/nvmesh/csi-4 rw,logbufs=8
torn line
94 22 7:7 / /cut - xfs
"""


def entry(mount_id: int) -> mount_table.Entry:
    return next(found for found in mount_table.parse(TABLE) if found.mount_id == mount_id)


def test_complete_lines_are_read() -> None:
    assert [found.mount_id for found in mount_table.parse(TABLE)] == [22, 90, 91, 92, 93]


@pytest.mark.parametrize("end", [*"\x0b\x0c\r\x1c\x1d\x1e\x85\u2028\u2029"], ids=ascii)
def test_a_path_may_have_line_separators(end: str) -> None:
    assert [found.path for found in mount_table.parse(TABLE.replace("/multi", f"/multi{end}b"))][3:] == [
        Path(f"/multi{end}b"),
        Path("/target"),
    ]


def test_octal_escapes_are_undone() -> None:
    assert entry(90).path == Path("/var/lib/kubelet/a b\tc\nd\\e")


def test_options_of_mount_and_filesystem_are_joined_without_ro_and_rw() -> None:
    assert entry(90).options == {"noatime", "stripe=32"}


@pytest.mark.parametrize(("mount_id", "read_only"), [(22, False), (90, True), (91, True)])
def test_a_mount_is_read_only_when_it_or_its_filesystem_is(mount_id: int, read_only: bool) -> None:
    assert entry(mount_id).read_only is read_only


def test_the_root_within_the_filesystem_is_kept() -> None:
    assert (entry(91).root, entry(91).fs_type, entry(91).number) == ("/nvmesh/csi-2", "devtmpfs", DeviceNumber(0, 5))


@pytest.mark.parametrize(("mount_id", "shared"), [(22, True), (90, True), (91, False)])
def test_a_mount_of_a_peer_group_propagates(mount_id: int, shared: bool) -> None:
    assert entry(mount_id).shared is shared


# /mnt/data/kubelet is bound at /var/lib/kubelet, both shared: each mount below one appears below the other as well.
SHARED_DIRECTORY = """30 22 8:1 / /mnt/data rw shared:7 - ext4 /dev/sda1 rw
31 22 8:1 /kubelet /var/lib/kubelet rw shared:7 - ext4 /dev/sda1 rw
40 31 7:5 / /var/lib/kubelet/staging rw shared:9 - ext4 /dev/nvmesh/csi-1 rw
41 30 7:5 / /mnt/data/kubelet/staging rw shared:9 - ext4 /dev/nvmesh/csi-1 rw
42 31 7:5 / /var/lib/kubelet/pods/1 rw shared:9 - ext4 /dev/nvmesh/csi-1 rw
43 30 7:5 / /mnt/data/kubelet/pods/1 rw shared:9 - ext4 /dev/nvmesh/csi-1 rw
44 30 7:6 / /mnt/data/kubelet/staging rw shared:10 - ext4 /dev/nvmesh/csi-2 rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/var/lib/kubelet/staging", ["/mnt/data/kubelet/staging"]),
        ("/var/lib/kubelet/pods/1", ["/mnt/data/kubelet/pods/1"]),
        ("/mnt/data/kubelet/pods/1", ["/var/lib/kubelet/pods/1"]),
        ("/var/lib/kubelet/pods/2", []),
        ("/mnt/data", []),
    ],
)
def test_a_mount_in_a_shared_directory_has_twins(path: str, expected: list[str]) -> None:
    table = mount_table.parse(SHARED_DIRECTORY)
    assert mount_table.twins(table, Path(path)) == [Path(each) for each in expected]


def test_a_private_directory_has_no_twins() -> None:
    table = mount_table.parse(SHARED_DIRECTORY.replace("/var/lib/kubelet rw shared:7", "/var/lib/kubelet rw"))
    assert mount_table.twins(table, Path("/var/lib/kubelet/staging")) == []


# --- options ----------------------------------------------------------------------------------------------------


def test_options_are_sorted_by_recipient() -> None:
    sorted_options = mount_options.sort_options(
        ["noatime", "nodev", "data=ordered", "dirsync", "defaults"], read_only=False
    )
    assert sorted_options.attributes == syscalls.MOUNT_ATTR_NOATIME | syscalls.MOUNT_ATTR_NODEV
    assert sorted_options.superblock == ("dirsync",)
    assert sorted_options.own == ("data=ordered",)


@pytest.mark.parametrize(("options", "read_only"), [([], True), (["ro"], False), (["ro"], True)])
def test_read_only_holds_for_mount_and_superblock(options: list[str], read_only: bool) -> None:
    sorted_options = mount_options.sort_options(options, read_only=read_only)
    assert sorted_options.attributes & syscalls.MOUNT_ATTR_RDONLY
    assert sorted_options.superblock == ("ro",)


def test_of_several_access_times_the_last_counts() -> None:
    sorted_options = mount_options.sort_options(["noatime", "strictatime"], read_only=False)
    assert sorted_options.attributes == syscalls.MOUNT_ATTR_STRICTATIME


CONTEXT = "context=system_u:object_r:container_file_t:s0:c1,c2"


def test_an_selinux_context_with_commas_is_one_option() -> None:
    assert mount_options.sort_options(["noatime", CONTEXT, "commit=5"], read_only=False).own == (CONTEXT, "commit=5")


@pytest.mark.parametrize("option", ["", "noatime,nodev", "commit=5,nodev", 'context="a,b"', 'data="ordered', "=5"])
def test_several_options_in_one_word_are_refused(option: str) -> None:
    with pytest.raises(InvalidField, match="mount_flags"):
        mount_options.sort_options([option], read_only=False)


@pytest.mark.parametrize("option", ["bind", "remount,rw", "move", "loop", "offset=4096", "rshared", "source=/dev/sda"])
def test_words_of_mount_8_are_refused(option: str) -> None:
    with pytest.raises(InvalidField, match="mount_flags"):
        mount_options.sort_options([option], read_only=False)


def test_options_are_named_as_in_the_table() -> None:
    attributes = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID
    assert mount_options.shown_options(attributes, syscalls.MS_SYNCHRONOUS) == {"nosuid", "relatime", "sync"}
    assert mount_options.shown_options(syscalls.MOUNT_ATTR_STRICTATIME, 0) == frozenset()
