# SPDX-License-Identifier: Apache-2.0
"""NVMe subsystems in sysfs: how much is read to find one."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_driver.host import nvme_host, syscalls
from csi_driver.host.nvme_host import Sysfs

SUBSYSTEMS = 50


class Counted:
    """A sysfs of subsystems without controllers."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = root / "class/nvme-subsystem"
        self.directory.mkdir(parents=True)
        self.sysfs = Sysfs(root)
        self.reads = 0
        read_file = syscalls.read_file

        def read(path: str, most_bytes: int) -> bytes:
            self.reads += 1
            return read_file(path, most_bytes)

        monkeypatch.setattr(nvme_host, "read_file", read)

    def add(self, name: str, nqn: str) -> None:
        (self.directory / name).mkdir()
        (self.directory / name / "subsysnqn").write_text(f"{nqn}\n")

    def reads_for(self, nqn: str) -> int:
        self.reads = 0
        self.sysfs.find(nqn)
        return self.reads


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    found = Counted(tmp_path, monkeypatch)
    for number in range(SUBSYSTEMS):
        found.add(f"nvme-subsys{number}", f"nqn-{number}")
    return found


def test_a_subsystem_is_read_once_in_all_searches(counted: Counted) -> None:
    assert counted.reads_for("nqn-absent") == SUBSYSTEMS
    assert counted.reads_for("nqn-absent") == 0
    counted.add("nvme-subsys99", "nqn-new")
    assert counted.reads_for("nqn-new") == 1
    assert counted.reads_for("nqn-new") == 1


def test_the_subsystem_of_a_new_connection_is_found_without_a_look_at_the_others(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted.add("nvme-subsys77", "nqn-new")
    monkeypatch.setattr(nvme_host, "_entries", lambda directory: pytest.fail(f"{directory} was listed"))
    counted.sysfs.connected("nvme77", "nqn-new")
    assert counted.reads_for("nqn-new") == 1


def test_a_further_controller_of_a_subsystem_does_not_tell_its_place(counted: Counted) -> None:
    counted.sysfs.connected("nvme8", "nqn-7")
    counted.sysfs.connected("nvme99", "nqn-7")
    found = counted.sysfs.find("nqn-7")
    assert found is not None
    assert (found.name, found.nqn) == ("nvme-subsys7", "nqn-7")


def test_a_subsystem_that_got_the_name_of_another_one_is_read_again(counted: Counted) -> None:
    assert counted.sysfs.find("nqn-7") is not None
    (counted.directory / "nvme-subsys7").rename(counted.directory.parent / "removed")  # its inode stays in use
    counted.add("nvme-subsys7", "nqn-later")
    assert counted.sysfs.find("nqn-7") is None
    found = counted.sysfs.find("nqn-later")
    assert found is not None
    assert found.name == "nvme-subsys7"


def test_a_subsystem_whose_name_is_not_shown_yet_is_read_again(counted: Counted) -> None:
    (counted.directory / "nvme-subsys99").mkdir()
    assert counted.sysfs.find("nqn-new") is None
    (counted.directory / "nvme-subsys99" / "subsysnqn").write_text("nqn-new\n")
    assert counted.sysfs.find("nqn-new") is not None
