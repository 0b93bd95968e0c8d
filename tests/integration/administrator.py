# SPDX-License-Identifier: Apache-2.0
"""Actions of an administrator or an earlier driver, through the management API and with tools.

Nothing here uses the driver, so the result is that of earlier drivers.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from csi_driver.deadline import Deadline
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.storage_model import DeviceStatus, Layout, ReservationMode, Volume, VolumeSpec
from tests.integration.rig import Rig, wait_for

USER = "admin@nvidia.com"


class Administrator:
    """An administrator with the management's password and root on the machine."""

    def __init__(self, rig: Rig, management: ManagementClient) -> None:
        self._rig = rig
        self.management = management

    @property
    def deadline(self) -> Deadline:
        return Deadline.after(30)

    def create(
        self,
        name: str,
        metadata: Mapping[str, object] | None = None,
        *,
        gigabytes: float = 1.1,
        vpg: str | None = None,
    ) -> Volume:
        """Make a volume of this name and wait until it can be used."""
        layout = Layout() if vpg is None else None
        spec = VolumeSpec(name=name, capacity_gb=gigabytes, metadata=metadata or {}, vpg=vpg, layout=layout)
        assert self.management.create_volume(spec, deadline=self.deadline) is not None
        wait_for(lambda: not self.volume(name).is_being_made, f"{name} to be usable")
        return self.volume(name)

    def volume(self, name: str) -> Volume:
        """Return the volume as the management shows it."""
        volume = self.management.volume(name, deadline=self.deadline)
        assert volume is not None
        return volume

    def attach(
        self,
        volume: Volume,
        *,
        mode: ReservationMode = ReservationMode.EXCLUSIVE_READ_WRITE,
        reference_id: str | None = None,
    ) -> Path:
        """Attach it to the rig's node, by default as the 1.4 driver did: without a reference id. Return its device."""
        client = self.management.client_by_uuid(self._rig.node_id(), deadline=self.deadline)
        assert client is not None
        self.management.attach(client, volume, mode=mode, reference_id=reference_id, deadline=self.deadline)
        wait_for(lambda: self.is_attached(volume), f"{volume.name} to be attached")
        return self._rig.directory / "dev" / volume.name

    def detach(self, volume: Volume, *, reference_id: str | None = None) -> None:
        """Detach it from the rig's node and wait until it is gone."""
        client = self.management.client_by_uuid(self._rig.node_id(), deadline=self.deadline)
        assert client is not None
        self.management.detach(client, volume, reference_id=reference_id, deadline=self.deadline)
        wait_for(lambda: not self.is_held(volume), f"{volume.name} to be detached")

    def is_attached(self, volume: Volume) -> bool:
        """Return whether the rig's node reports the device as usable."""
        client = self.management.client_by_uuid(self._rig.node_id(), deadline=self.deadline)
        report = client.devices.get(volume.uuid) if client is not None else None
        return report is not None and report.status is DeviceStatus.ATTACHED and report.io_enabled

    def is_held(self, volume: Volume) -> bool:
        """Return whether any node holds the volume in any way."""
        return bool(self.management.clients_holding(volume.uuid, deadline=self.deadline))

    def references(self, volume: Volume) -> frozenset[str]:
        """Return the reference ids under which the rig's node is to hold the volume."""
        client = self.management.client_by_uuid(self._rig.node_id(), deadline=self.deadline)
        assert client is not None
        wish = client.desired.get(volume.uuid)
        return wish.reference_ids if wish is not None else frozenset()


@contextmanager
def administrator(rig: Rig) -> Iterator[Administrator]:
    """Log in to the rig's storage manager."""
    words = rig.role_argv("controller")
    settings = ManagementSettings(
        servers=(words[words.index("--management-server") + 1],),
        username=USER,
        password_file=rig.directory / "pool" / "password",
    )
    client = ManagementClient(settings)
    try:
        yield Administrator(rig, client)
    finally:
        client.close()


def make_filesystem(device: Path, fs_type: str, *options: str) -> None:
    """Make a filesystem with the distribution's own tool."""
    force = {"ext4": "-F", "xfs": "-f", "btrfs": "-f"}[fs_type]
    subprocess.run([f"mkfs.{fs_type}", force, *options, str(device)], check=True, capture_output=True)


def mount(device: Path, target: Path, *options: str) -> None:
    """Mount with mount(8)."""
    target.mkdir(parents=True, exist_ok=True)
    words = ["-o", ",".join(options)] if options else []
    subprocess.run(["mount", *words, str(device), str(target)], check=True, capture_output=True)


def unmount(target: Path) -> None:
    """Unmount with umount(8)."""
    subprocess.run(["umount", str(target)], check=True, capture_output=True)
