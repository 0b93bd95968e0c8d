# SPDX-License-Identifier: Apache-2.0
"""The client's status and real devices: loop devices, and one without label or serial number.
Such are the devices of NVMesh while its client is upgraded.

The latter is a zram device, which like those of NVMesh has sectors of 4 KiB.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, IdentityNotProven, PreconditionFailed
from csi_driver.host.connectors.nvmesh import StatusFiles
from csi_driver.host.devices import LinuxDevices
from csi_driver.host_model import DeviceNumber
from csi_driver.model import MIB
from tests.contract.host_machine import HostMachine, host_machine
from tests.contract.test_host_devices import ManualClock

pytestmark = pytest.mark.root

CONTROL = Path("/sys/class/zram-control")
UUID = "01234567-89ab-cdef-0123-456789abcdef"
OTHER = "fedcba98-7654-3210-fedc-ba9876543210"
NAME = "csi-1"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        yield made


@dataclass
class Silent:
    """A device without label and serial number, under the name of a volume."""

    machine: HostMachine
    number: DeviceNumber

    def says(self, uuid: str = UUID, **more: object) -> None:
        self.machine.write_status(NAME, uuid, 64 * MIB, **more)

    def falls_silent(self) -> None:
        (self.machine.status_root / "volumes" / NAME / "status.json").unlink()


@pytest.fixture
def silent(machine: HostMachine) -> Iterator[Silent]:
    if not CONTROL.is_dir():
        pytest.skip("this kernel makes no zram devices: `modprobe zram`, then run `make test` as root")
    index = int((CONTROL / "hot_add").read_text())
    block = Path(f"/sys/block/zram{index}")
    try:
        (block / "disksize").write_text(str(64 * MIB))
        major, _, minor = (block / "dev").read_text().strip().partition(":")
        number = DeviceNumber(int(major), int(minor))
        os.mknod(machine.device_root / NAME, stat.S_IFBLK | 0o600, os.makedev(number.major, number.minor))
        yield Silent(machine, number)
    finally:
        with contextlib.suppress(OSError):
            (block / "reset").write_text("1")
        (CONTROL / "hot_remove").write_text(str(index))


def awaited(devices: LinuxDevices, uuid: str | None, clock: ManualClock, seconds: float = 30) -> object:
    return devices.wait_for(NAME, uuid, deadline=Deadline.after(seconds, clock))


# --- a device without label and serial number -------------------------------------------------------------------


@pytest.mark.parametrize("uuid", [UUID, None])
def test_a_device_without_evidence_is_never_ready(silent: Silent, uuid: str | None) -> None:
    with pytest.raises(DeadlineReached, match="nothing on this machine says"):
        awaited(silent.machine.devices, uuid, ManualClock())
    device = silent.machine.devices.find(NAME, UUID)
    assert device is not None
    assert (device.number, device.uuid) == (silent.number, None)
    with pytest.raises(IdentityNotProven), silent.machine.devices.open(device, write=True):
        pass


def test_a_device_is_ready_as_soon_as_its_client_is_back(silent: Silent) -> None:
    clock = ManualClock()
    clock.on_sleep = silent.says
    device = silent.machine.devices.wait_for(NAME, UUID, deadline=Deadline.after(30, clock))
    assert (device.uuid, device.number) == (UUID, silent.number)
    assert clock.now_s > 0


def test_a_device_without_client_status_is_not_written(silent: Silent) -> None:
    silent.says()
    devices = silent.machine.devices
    device = devices.wait_for(NAME, UUID, deadline=Deadline.after(30, ManualClock()))
    with devices.open(device, write=True, exclusive=True):
        pass
    silent.falls_silent()
    with pytest.raises(IdentityNotProven), devices.open(device, write=True, exclusive=True):
        pass


def test_a_new_volume_under_the_same_name_is_refused(silent: Silent) -> None:
    silent.says()
    devices = silent.machine.devices
    device = devices.wait_for(NAME, UUID, deadline=Deadline.after(30, ManualClock()))
    silent.says(OTHER)
    with pytest.raises(PreconditionFailed, match=f"claims {OTHER}, expected {UUID}"):
        awaited(devices, UUID, ManualClock())
    with pytest.raises(PreconditionFailed, match=OTHER), devices.open(device):
        pass


def test_a_write_refusal_of_the_client_is_reported(silent: Silent) -> None:
    silent.says(reservation="SHARED_READ_ONLY")
    device = silent.machine.devices.wait_for(NAME, UUID, deadline=Deadline.after(30, ManualClock()))
    assert (device.read_only, device.is_writable) == (False, False)
    assert "SHARED_READ_ONLY" in device.write_refusal
    silent.says()
    found = silent.machine.devices.find(NAME)
    assert found is not None
    assert found.is_writable


# --- I/O --------------------------------------------------------------------------------------------------------


def test_wait_continues_until_io_is_enabled(machine: HostMachine) -> None:
    volume = machine.volume(NAME)
    off = {"status": "Live, no IO", "dbg": "0x1a1"}
    machine.write_status(NAME, volume.uuid, 64 * MIB, **off)
    with pytest.raises(
        DeadlineReached, match=r"has not enabled I/O for csi-1: status is 'Live, no IO'.*dbg is '0x1a1'"
    ):
        awaited(machine.devices, volume.uuid, ManualClock())
    clock = ManualClock()
    clock.on_sleep = lambda: machine.write_status(NAME, volume.uuid, 64 * MIB)
    awaited(machine.devices, volume.uuid, clock)
    assert clock.now_s > 0


def test_a_device_without_io_is_not_opened(machine: HostMachine) -> None:
    volume = machine.volume(NAME)
    device = machine.device(volume)
    machine.write_status(NAME, volume.uuid, 64 * MIB, status="Live, no IO, partial Error", dbg="0x2a1")
    device.path.unlink()  # an open fails
    with pytest.raises(PreconditionFailed, match="has not enabled I/O"), machine.devices.open(device):
        pass
    status = machine.devices.status(NAME)
    assert status is not None
    assert (status.io_enabled, status.uuid) == (False, volume.uuid)


@pytest.mark.parametrize("says", [{"dbg": 0x2A1, "io_enabled": 0}, {"dbg": 0x2A1, "io_enabled": 1}, {"dbg": "new"}])
def test_contradictory_io_fields_prevent_the_open(machine: HostMachine, says: dict[str, object]) -> None:
    """One field is some seconds late: just after the loss of I/O an open may hang."""
    volume = machine.volume(NAME)
    device = machine.device(volume)
    assert machine.devices.uuid_of(device.number) == volume.uuid
    machine.write_status(NAME, OTHER, 64 * MIB, **says)
    found = machine.devices.find(NAME)
    assert found is not None
    # The device itself would name its volume.
    assert (found.uuid, found.number, found.size_bytes) == (OTHER, device.number, 64 * MIB)
    assert (machine.devices.uuid_of(device.number), machine.devices.is_claimed(device)) == (None, None)


# --- right after the attachment ---------------------------------------------------------------------------------


def test_wait_continues_until_the_device_has_a_size(machine: HostMachine) -> None:
    volume = machine.volume(NAME)
    with volume.file.open("r+b") as file:
        file.truncate(0)
    machine.loops.grow(volume.loop)
    clock = ManualClock()
    clock.on_sleep = lambda: machine.grow(volume, 64 * MIB)
    device = machine.devices.wait_for(NAME, volume.uuid, deadline=Deadline.after(30, clock))
    assert device.size_bytes == 64 * MIB
    assert clock.now_s > 0


def test_a_short_exclusive_open_is_waited_for(machine: HostMachine) -> None:
    """The client scans for partitions right after I/O was enabled."""
    device = machine.device(machine.volume(NAME))
    holder = os.open(device.path, os.O_RDONLY | os.O_EXCL)
    clock = ManualClock()
    released: list[float] = []

    def release() -> None:
        if not released:
            os.close(holder)
            released.append(clock.now_s)

    clock.on_sleep = release
    patient = LinuxDevices(machine.device_root, machine.status_root, clock=clock)
    with patient.open(device, write=True, exclusive=True):
        assert released


# --- the client -------------------------------------------------------------------------------------------------


def test_device_nodes_without_status_files_mean_a_client_is_expected(machine: HostMachine) -> None:
    files = StatusFiles(machine.status_root, upgrade_marks=[], client_signs=[])
    devices = LinuxDevices(machine.device_root, status_files=files)
    assert not devices.client().is_expected
    machine.volume(NAME, status=False)
    assert (devices.client().uuid, devices.client().is_expected) == (None, True)
    machine.status_root.mkdir()
    (machine.status_root / "status.json").write_text(f'{{"main": {{"uuid": "{UUID}"}}}}')
    assert devices.client().uuid == UUID
    assert devices.client().volume_limit == 1024


def test_hidden_attachments_reduce_the_volume_limit(machine: HostMachine) -> None:
    machine.volume(NAME)
    machine.write_status("hidden-1", OTHER, 64 * MIB, type="hidden")
    machine.write_status("hidden-2", OTHER, 64 * MIB, type="hidden")
    (machine.status_root / "status.json").write_text(f'{{"main": {{"uuid": "{UUID}"}}}}')
    assert machine.devices.client().volume_limit == 1022
    (machine.status_root / "version").write_text('{"module": "embedded", "version": "1"}')
    assert machine.devices.client().volume_limit == 0
