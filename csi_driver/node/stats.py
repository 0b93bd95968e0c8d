"""Use of a volume, answered in time whatever hangs (kubelet waits for it with everything else it measures)."""

from __future__ import annotations

from csi_driver.deadline import Deadline
from csi_driver.errors import PreconditionFailed, StorageUnavailable, VolumeNotMounted
from csi_driver.host_model import FaultKind
from csi_driver.model import Usage
from csi_driver.node.expand import known_path
from csi_driver.node.ownership import Owner, Ownership, named, number_of
from csi_driver.node.ports import Devices, Filesystems, Mounts, Paths, Probes
from csi_driver.node.questions import Questions
from csi_driver.node.requests import NodeSettings


class Statistics:
    """NodeGetVolumeStats."""

    def __init__(
        self,
        *,
        devices: Devices,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        probes: Probes,
        ownership: Ownership,
        settings: NodeSettings,
    ) -> None:
        self._devices = devices
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._probes = probes
        self._ownership = ownership
        self._timeout_s = settings.statistics_timeout_s
        self._margin_s = settings.answer_margin_s
        self._questions: Questions[Usage] = Questions("volume-statistics")

    def usage(self, volume_id: str, volume_path: str, staging_target_path: str, *, deadline: Deadline) -> Usage:
        """Return the use of the volume at `volume_path`. A block volume has only its size.

        Raises `VolumeNotMounted`, `PreconditionFailed` when its filesystem was shut down, `StorageUnavailable` when its
        filesystem or device does not answer: after the settings' time the first time, at once while that question is
        still open.
        """
        volume, _ = named(volume_id)
        path = known_path(self._paths, volume, volume_path)

        def ask() -> Usage:
            mounted = self._mounts.at(path)
            owner = Owner.OTHER if mounted is None else self._ownership.owner_of(mounted, volume)
            if mounted is None or owner is Owner.OTHER:
                raise VolumeNotMounted(volume, path)
            number = number_of(mounted)
            size = self._devices.size_bytes(number) if number.major else None
            if owner is Owner.DEAD or (number.major and not size):
                raise StorageUnavailable(f"the device {number} of volume {volume} at {path} is gone")
            if mounted.node_number is not None and size:
                return Usage(total_bytes=size)
            dead = self._probes.dead(mounted)
            if dead is not None and dead.kind is FaultKind.SHUT_DOWN:
                raise PreconditionFailed(f"volume {volume} at {path} has no statistics: {dead.detail}")
            return self._filesystems.usage(path)

        timeout_s = min(self._timeout_s, max(0.0, deadline.remaining_s() - self._margin_s))
        return self._questions.ask(volume.name, str(path), ask, timeout_s)
