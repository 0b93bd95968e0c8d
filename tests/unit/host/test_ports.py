"""The adapter fits what its users declare; mypy is the judge, run by tests/unit/test_types.py."""

from __future__ import annotations

from pathlib import Path

from csi_driver.embedded import settings as embedded
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.node import ports


def test_the_adapter_fits_the_ports_of_the_node(tmp_path: Path) -> None:
    paths = LinuxPaths([tmp_path])
    linux_devices = LinuxDevices(tmp_path, tmp_path)
    devices: ports.Devices = linux_devices
    readers: ports.ReadOnlyDevices = ReadOnlyLoops(LoopDevices())
    mounts: ports.Mounts = LinuxMounts(paths.open)
    filesystems: ports.Filesystems = LinuxFilesystems(linux_devices)
    checked_paths: ports.Paths = paths
    tools: ports.Tools = MachineTools([tmp_path])
    assert all((devices, readers, mounts, filesystems, checked_paths, tools))


def test_the_adapter_fits_the_port_of_the_embedded_manager() -> None:
    loops: embedded.LoopDevices = LoopDevices()
    assert loops is not None
