# SPDX-License-Identifier: Apache-2.0
"""Each adapter fits the ports of its users. pytest runs nothing of this: mypy reads it (tests/unit/test_types.py)."""

from __future__ import annotations

from csi_driver.controller.ports import Clusters, Management
from csi_driver.embedded import settings as embedded
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption, LuksFiles
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.paths import LinuxPaths
from csi_driver.management.client import ManagementClient
from csi_driver.management.clusters import FileClusters, OneCluster
from csi_driver.node import ports


def devices(adapter: LinuxDevices) -> ports.Devices:
    return adapter


def read_only_devices(adapter: ReadOnlyLoops) -> ports.ReadOnlyDevices:
    return adapter


def mounts(adapter: LinuxMounts) -> ports.Mounts:
    return adapter


def filesystems(adapter: LinuxFilesystems) -> ports.Filesystems:
    return adapter


def encryption(adapter: LinuxEncryption) -> ports.Encryption:
    return adapter


def probes(adapter: LinuxProbes) -> ports.Probes:
    return adapter


def paths(adapter: LinuxPaths) -> ports.Paths:
    return adapter


def tools(adapter: MachineTools) -> ports.Tools:
    return adapter


def embedded_loops(adapter: LoopDevices) -> embedded.LoopDevices:
    return adapter


def embedded_headers(adapter: LuksFiles) -> embedded.LuksHeaders:
    return adapter


def management(adapter: ManagementClient) -> Management:
    return adapter


def clusters(adapter: OneCluster | FileClusters) -> Clusters:
    return adapter
