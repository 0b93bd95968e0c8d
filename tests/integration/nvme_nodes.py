# SPDX-License-Identifier: Apache-2.0
"""Nodes that connect volumes by NVMe/TCP, over the fake of the kernel, whose namespaces are real loop devices.

What a node formats, mounts and writes is real; the target is exported files of one storage machine.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.host.connectors.loop import LoopDevices, ReadOnlyLoops
from csi_driver.host.connectors.nvme import NvmeVolumes
from csi_driver.host.connectors.nvme_paths import PathKeeper
from csi_driver.host.devices import LinuxDevices
from csi_driver.host.filesystem import LinuxFilesystems
from csi_driver.host.health import LinuxProbes
from csi_driver.host.luks import LinuxEncryption
from csi_driver.host.machine_checks import MachineTools
from csi_driver.host.mounts import LinuxMounts
from csi_driver.host.nvme_target import NvmeTarget
from csi_driver.host.paths import LinuxPaths
from csi_driver.model import MIB, AccessMode, BlockAccess, Capability, CapacityRange, MountAccess
from csi_driver.node import NodeExpandRequest, NodePublishRequest, StageRequest
from csi_driver.node.service import NodeUseCases, assemble
from csi_driver.node_settings import NodeSettings
from csi_driver.nvme_model import NvmeExport, TargetExport, host_nqn, subsystem_nqn
from csi_driver.publish_context import History, PublishContext
from tests.contract.host_machine import mounts_below
from tests.fakes.nvme_host_kernel import HostKernel
from tests.fakes.nvme_kernel import NvmeKernel

EXT4, BLOCK = MountAccess("ext4"), BlockAccess()
WRITER = AccessMode.SINGLE_NODE_WRITER
ADDRESS = "127.0.0.1"


@dataclass
class Volume:
    """A file of the storage machine. `attachments` counts them, as the controller does."""

    name: str
    uuid: str
    file: Path
    attachments: int = 0

    @property
    def volume_id(self) -> str:
        return f"zone:{self.name}:{self.uuid}"


@dataclass
class Attachment:
    """One attachment of a volume to a node: its export and its publish context."""

    volume: Volume
    export: TargetExport
    context: dict[str, str]


class Storage:
    """The storage machine, without a manager: every attachment has an export of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel = NvmeKernel()
        self.target = NvmeTarget(self.kernel.configfs, self.kernel.connections)
        self.pool = str(uuid.uuid4())
        self._ports = iter(range(23000, 24000))

    def volume(self, name: str = "csi-1", size_bytes: int = 64 * MIB) -> Volume:
        made = Volume(name, str(uuid.uuid4()), self.directory / f"{name}.img")
        with made.file.open("wb") as file:
            file.truncate(size_bytes)
        return made

    def attach(self, volume: Volume, node_id: str, *, read_only: bool = False) -> Attachment:
        volume.attachments += 1
        number = volume.attachments
        nqn, port = subsystem_nqn(self.pool, volume.uuid, f"token{number}"), next(self._ports)
        export = TargetExport(nqn, volume.uuid, volume.file, port, (ADDRESS,), frozenset({host_nqn(node_id)}))
        self.target.apply(export)
        context = PublishContext(
            volume.name,
            volume.uuid,
            number,
            History.FIRST if number == 1 else History.ATTACHED,
            read_only,
            volume.file.stat().st_size,
            nvme=NvmeExport(nqn, (f"{ADDRESS}:{port}",)),
        )
        return Attachment(volume, export, context.as_map())

    def has_connection(self, attachment: Attachment) -> bool:
        port = attachment.export.port
        return any(each.is_live for each in self.target.connections([port])[port])

    def detach(self, attachment: Attachment) -> None:
        """Detach a volume that its node has disconnected."""
        assert not self.has_connection(attachment)
        self.target.withdraw(attachment.export)

    def cut(self, attachment: Attachment) -> None:
        """Cut the node of an attachment off; it is refused from now on."""
        self.target.apply(replace(attachment.export, hosts=frozenset(), is_enabled=False))

    def grow(self, attachment: Attachment, size_bytes: int) -> None:
        with attachment.volume.file.open("r+b") as file:
            file.truncate(size_bytes)
        self.target.grow(attachment.export)


@dataclass
class NvmeNode:
    """A node of that storage machine. `path_root`: where its staging and target paths are, by default below `root`."""

    target_kernel: NvmeKernel
    node_id: str
    root: Path
    path_root: Path = Path()
    kernel: HostKernel = field(init=False)
    use: NodeUseCases = field(init=False)
    keeper: PathKeeper = field(init=False)

    def __post_init__(self) -> None:
        if self.path_root == Path():
            self.path_root = self.root / "kubelet"
        for place in (self.root / "dev", self.root / "proc", self.path_root):
            place.mkdir(parents=True, exist_ok=True)
        self._boot(0)

    def _boot(self, number: int) -> None:
        sysfs = self.root / f"sys{number}"
        sysfs.mkdir()
        self.kernel = HostKernel(self.target_kernel, sysfs, devices=True)
        self.restart()

    def restart(self) -> None:
        """Start the driver again on the running machine."""
        volumes = NvmeVolumes(
            lambda: self.node_id,
            self.root / "dev",
            self.root / "registry",
            fabrics=self.kernel.fabrics,
            sysfs=self.kernel.sysfs,
        )
        self.keeper = PathKeeper(volumes, round_s=60)  # a round ends with the results of its connects
        self.devices = LinuxDevices(self.root / "dev", self.root / "proc", keeper=self.keeper)
        paths = LinuxPaths([self.path_root])
        self.use = assemble(
            devices=self.devices,
            encryption=LinuxEncryption(self.devices),
            read_only_devices=ReadOnlyLoops(LoopDevices()),
            mounts=LinuxMounts(paths.open),
            filesystems=LinuxFilesystems(self.devices),
            paths=paths,
            probes=LinuxProbes(),
            tools=MachineTools([self.path_root]),
            settings=NodeSettings(node_name=self.node_id, state_directory=self.root / "state"),
        )

    def reboot(self) -> None:
        """Reboot: mounts, connections, records and device nodes are gone."""
        self.clean_up()
        for name in ("dev", "registry"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "dev").mkdir()
        self._boot(len(list(self.root.glob("sys*"))))

    def clean_up(self) -> None:
        for point in mounts_below(self.path_root):
            subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
        for _ in range(len(self.kernel.subsystems)):
            for each in [each for subsystem in self.kernel.subsystems for each in subsystem.controllers]:
                self.kernel.delete(each.name, each.nqn)
        self.kernel.close()

    # --- calls ------------------------------------------------------------------------------------------------------

    def staging(self, volume: Volume, number: int = 1) -> Path:
        path = self.path_root / f"{volume.name}.staging{number}"
        path.mkdir(exist_ok=True)
        return path

    def target(self, volume: Volume) -> Path:
        return self.path_root / f"{volume.name}.pod"

    def stage(
        self,
        attachment: Attachment,
        access: MountAccess | BlockAccess = EXT4,
        *,
        mode: AccessMode = WRITER,
        number: int = 1,
    ) -> Path:
        volume = attachment.volume
        path = self.staging(volume, number)
        request = StageRequest(volume.volume_id, str(path), Capability(access, mode), attachment.context)
        self.use.stage.stage(request, deadline=Deadline.after(60))
        return path

    def unstage(self, volume: Volume, number: int = 1, within_s: float = 60) -> None:
        path = self.staging(volume, number)
        self.use.stage.unstage(volume.volume_id, str(path), deadline=Deadline.after(within_s))

    def publish(
        self, attachment: Attachment, access: MountAccess | BlockAccess = EXT4, *, mode: AccessMode = WRITER
    ) -> Path:
        volume, target = attachment.volume, self.target(attachment.volume)
        capability = Capability(access, mode)
        request = NodePublishRequest(
            volume.volume_id, str(self.staging(volume)), str(target), capability, mode.is_read_only, attachment.context
        )
        self.use.publish.publish(request, deadline=Deadline.after(60))
        return target

    def unpublish(self, volume: Volume) -> None:
        target = str(self.target(volume))
        self.use.publish.unpublish(volume.volume_id, target, deadline=Deadline.after(60))

    def expand(self, volume: Volume, size_bytes: int) -> int:
        target = str(self.target(volume))
        request = NodeExpandRequest(volume.volume_id, target, CapacityRange(size_bytes), str(self.staging(volume)))
        return self.use.expand.expand(request, deadline=Deadline.after(60))

    def down(self, volume: Volume) -> None:
        self.unpublish(volume)
        self.unstage(volume)

    def is_clean(self, volume: Volume) -> bool:
        """Whether nothing of the volume is left on this node."""
        return (
            not mounts_below(self.path_root)
            and not self.kernel.subsystems
            and not (self.root / "dev" / volume.name).exists()
            and not list((self.root / "registry").glob("*"))
        )


@contextlib.contextmanager
def storage_and_nodes(directory: Path) -> Iterator[tuple[Storage, Callable[[str], NvmeNode]]]:
    """Give a storage machine, and a function that makes a node of that id; all of it is removed at the end."""
    (directory / "pool").mkdir()
    storage = Storage(directory / "pool")
    nodes: list[NvmeNode] = []

    def make(node_id: str) -> NvmeNode:
        nodes.append(NvmeNode(storage.kernel, node_id, directory / node_id))
        return nodes[-1]

    try:
        yield storage, make
    finally:
        for node in nodes:
            node.clean_up()
