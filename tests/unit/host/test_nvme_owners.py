# SPDX-License-Identifier: Apache-2.0
"""Marks of this driver's NVMe connections in a registry that other programs use too."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from csi_driver.host.nvme_owners import Owners


def marked(directory: Path, *controllers: str) -> Owners:
    owners = Owners(directory)
    for each in controllers:
        owners.mark(each)
    return owners


def sweep(owners: Owners, present: Collection[str] = ()) -> set[str]:
    owners.sweep(lambda name: name in present, present)
    return {str(each.relative_to(owners.directory)) for each in owners.directory.glob("*/*")}


def test_a_sweep_removes_the_marks_of_controllers_that_are_gone(tmp_path: Path) -> None:
    owners = marked(tmp_path, "nvme1", "nvme2")
    (tmp_path / "nvme1" / ".owner.1").write_text("")  # the draft of a driver that was killed
    assert sweep(owners, present=["nvme2"]) == {"nvme2/owner"}
    assert not (tmp_path / "nvme1").exists()


def test_a_sweep_removes_nothing_of_another_program(tmp_path: Path) -> None:
    owners = marked(tmp_path, "nvme1")
    (tmp_path / "nvme1" / "policy").write_text("theirs")
    assert sweep(owners) == {"nvme1/policy"}


def test_a_sweep_goes_on_behind_entries_without_an_owner(tmp_path: Path) -> None:
    owners = marked(tmp_path, *(f"nvme{number}" for number in range(1, 20)))
    for number in range(20, 40):
        (tmp_path / f"nvme{number}").mkdir()
    assert sweep(owners) == set()


def test_a_sweep_without_a_registry_does_nothing(tmp_path: Path) -> None:
    assert sweep(Owners(tmp_path / "none")) == set()
