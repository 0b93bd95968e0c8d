# SPDX-License-Identifier: Apache-2.0
"""Mount flags: accepted, dropped and refused options, and differences of a mount."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.errors import InvalidField, InvalidRequest
from csi_driver.host_model import DeviceNumber, Mount
from csi_driver.model import AccessMode, MountAccess
from csi_driver.parameters.mkfs import MkfsRequest
from csi_driver.parameters.mount_options import MountPlan, differences, mount_flags, plan_mount

SUPPORTED = ("ext4", "xfs", "btrfs")


def plan(
    *flags: str, fs_type: str = "ext4", mode: AccessMode = AccessMode.SINGLE_NODE_WRITER, read_only: bool = False
) -> MountPlan:
    return plan_mount(MountAccess(fs_type, flags), mode, read_only=read_only, mkfs=MkfsRequest(), supported=SUPPORTED)


@pytest.mark.parametrize(
    "flag",
    [
        "-o", "--bind", "-t", "bind", "rbind", "remount", "move", "rprivate", "loop=/dev/loop1", "offset=4096", "a b",
        "noatime\n", "x\0y", "noatime,bind", "device=/dev/sda", "logdev=/dev/sda", "journal_dev=8",
        "subvol=/x", "errors=panic", "suid", "dev", "nosuid,suid", "x-mount.mkdir", "X-mount.idmap=b:0:0:1",
        "x-systemd.automount",
        "source=/dev/sda", "shared", "rslave", "unbindable", "sizelimit=4096", "subvolid=5", "journal_path=/dev/sda",
        "test_dummy_encryption", "skip_balance", "uhelper=x", "noatime=/etc/passwd", "é", "nvmesh:chmod=99",
        "nvmesh:chmod=u+s", "helper=evil", "sb=8193", "context=a;b", "abort", "a" * 5000 + "!",
    ],
)  # fmt: skip
def test_a_flag_that_is_no_option_of_the_filesystem_is_refused(flag: str) -> None:
    with pytest.raises(InvalidRequest, match="mount_flags"):
        mount_flags([flag])


def test_a_refusal_does_not_repeat_the_value_of_an_option() -> None:
    with pytest.raises(InvalidRequest) as refusal:
        mount_flags(["logdev=hidden-value"])
    assert "hidden-value" not in str(refusal.value)


@pytest.mark.parametrize("flag", ["noatime", "commit=30", "discard", "errors=remount-ro", "data=writeback", "inode64"])
def test_an_option_of_a_filesystem_is_accepted(flag: str) -> None:
    assert mount_flags([flag]) == ((flag,), None)


def test_options_in_one_flag_are_split() -> None:
    assert mount_flags(["noatime,discard", "noatime"]) == (("noatime", "discard"), None)


@pytest.mark.parametrize(
    "flag",
    [
        "",
        ",",
        " ",
        "defaults",
        "rw",
        "silent",
        "loud",
        "iversion",
        "noiversion",
        "norelatime",
        "nostrictatime",
        "nofail",
    ],
)
def test_an_option_without_effect_is_dropped(flag: str) -> None:
    assert mount_flags([flag, "noatime"]) == (("noatime",), None)


@pytest.mark.parametrize("flag", ["noatime, nodiratime", " noatime,nodiratime ", "noatime,,nodiratime"])
def test_blanks_around_an_option_are_removed(flag: str) -> None:
    assert mount_flags([flag]) == (("noatime", "nodiratime"), None)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("subvol=/", "option 'subvol' cannot be used: another device or place on disk"),
        ("logdev=/dev/sdb", "option 'logdev' cannot be used: another device or place on disk"),
        ("errors=panic", "option 'errors=panic' cannot be used: harmful to the machine or to data; errors=remount-ro"),
        ("x-systemd.makefs", "for mount(8) and fstab, which are not used"),
        ("nvmesh:chmod=a+w", "expected a mode of three or four octal digits, such as nvmesh:chmod=0770"),
    ],
)
def test_a_refusal_gives_the_reason(flag: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        mount_flags([flag])
    assert said in str(refusal.value)


def test_a_volume_mount_group_is_refused() -> None:
    with pytest.raises(InvalidField, match="volume_mount_group: expected none"):
        plan_mount(
            MountAccess("ext4", (), "2000"),
            AccessMode.SINGLE_NODE_WRITER,
            read_only=False,
            mkfs=MkfsRequest(),
            supported=SUPPORTED,
        )


def test_an_selinux_context_keeps_its_commas_and_loses_its_quotes() -> None:
    flags, _ = mount_flags(['context="system_u:object_r:container_file_t:s0:c1,c2"'])
    assert flags == ("context=system_u:object_r:container_file_t:s0:c1,c2",)


@pytest.mark.parametrize(("flag", "mode"), [("nvmesh:chmod=777", 0o777), ("nvmesh:permissions=0750", 0o750)])
def test_a_mode_of_the_root_directory_is_not_passed_to_the_kernel(flag: str, mode: int) -> None:
    assert mount_flags([flag]) == ((), mode)


def test_xfs_is_mounted_with_nouuid() -> None:
    assert "nouuid" in plan(fs_type="xfs").options_for("xfs")


@pytest.mark.parametrize(
    ("fs_type", "options"),
    [("ext4", {"noload"}), ("xfs", {"norecovery", "nouuid"}), ("btrfs", {"rescue=nologreplay"})],
)
def test_a_reader_replays_no_journal(fs_type: str, options: set[str]) -> None:
    assert set(plan(fs_type=fs_type, mode=AccessMode.MULTI_NODE_READER_ONLY).options_for(fs_type)) == options


@pytest.mark.parametrize("option", ["noload", "norecovery", "rescue=all", "nologreplay"])
def test_a_writer_cannot_leave_the_journal_unread(option: str) -> None:
    with pytest.raises(InvalidRequest, match="journal"):
        plan(option)


def test_the_flag_ro_makes_the_access_read_only() -> None:
    assert plan("ro").read_only


@pytest.mark.parametrize("flags", [("rw", "ro"), ("ro,rw",)])
def test_the_flags_rw_and_ro_together_are_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(InvalidRequest, match="rw"):
        plan(*flags)


def test_the_flag_rw_gives_a_reader_no_write_access() -> None:
    reader = plan("rw", mode=AccessMode.SINGLE_NODE_READER_ONLY)
    assert (reader.read_only, reader.flags) == (True, ())


def test_data_err_abort_is_accepted() -> None:
    assert plan("data_err=abort").flags == ("data_err=abort",)


@pytest.mark.parametrize("mode", [AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_SINGLE_WRITER])
def test_a_filesystem_for_several_writing_nodes_is_refused(mode: AccessMode) -> None:
    with pytest.raises(InvalidField, match="access_mode"):
        plan(mode=mode)


def test_a_filesystem_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(InvalidField, match="fs_type"):
        plan(fs_type="zfs")


# --- comparing ---


def mounted(*options: str, fs_type: str = "ext4", read_only: bool = False) -> Mount:
    return Mount(Path("/s"), DeviceNumber(8, 1), fs_type, "/dev/x", "/", read_only, frozenset(options))


@pytest.mark.parametrize(
    ("shown", "plan"),
    [
        (mounted("relatime"), plan()),
        (mounted("noatime", "commit=30"), plan("noatime", "commit=30")),
        (mounted("relatime", "seclabel", "data=ordered"), plan()),
        (mounted("relatime", "attr2", "inode64", "logbufs=8", fs_type="xfs"), plan(fs_type="xfs")),
        (mounted("relatime"), plan("errors=remount-ro", "user_xattr")),
        (mounted("relatime", "logbsize=32k", fs_type="xfs"), plan("logbsize=32768", fs_type="xfs")),
        (mounted("relatime", fs_type="xfs"), plan(fs_type="")),
        (mounted("relatime", "noload", read_only=True), plan("ro")),
    ],
)
def test_a_correct_mount_has_no_differences(shown: Mount, plan: MountPlan) -> None:
    assert differences(shown, plan) == []


@pytest.mark.parametrize(
    ("shown", "plan", "said"),
    [
        (mounted("relatime", fs_type="xfs"), plan(fs_type="ext4"), "filesystem: expected ext4, got xfs"),
        (mounted("relatime"), plan("ro"), "access: expected read-only, got read-write"),
        (mounted("relatime", read_only=True), plan(), "access: expected read-write, got read-only"),
        (mounted("noexec"), plan(), "option noexec: expected not set, got set"),
        (mounted("relatime"), plan("noatime"), "option noatime: expected set, got not set"),
        (mounted("commit=5"), plan("commit=30"), "option commit: expected 30, got 5"),
    ],
)
def test_a_difference_is_named(shown: Mount, plan: MountPlan, said: str) -> None:
    assert said in differences(shown, plan)
