# SPDX-License-Identifier: Apache-2.0
"""NodeReclaimSpace and EncryptionKeyRotate of CSI-Addons, for volumes that are in use on this node."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi_driver.deadline import Deadline
from csi_driver.errors import InvalidRequest, MissingField, NotFound, NotOffered, PreconditionFailed, SystemCallFailed
from csi_driver.host_model import Device, Mount
from csi_driver.node.expand import Expand
from csi_driver.node.mount_owner import NodeVolume, VolumeDevice
from csi_driver.parameters.encryption import (
    DISCARDS,
    PASSPHRASE_KEYS,
    PREVIOUS_KEY,
    encrypted_by,
    passphrase_in,
    plan_encryption,
)
from csi_driver.publish_context import Encryption as By

logger = logging.getLogger(__name__)

_NO_TRIM = (errno.EOPNOTSUPP, errno.ENOTTY)


@dataclass(frozen=True, slots=True)
class NodeAddons:
    """`volumes` finds a volume's mount and device, by the evidence that an expansion needs."""

    volumes: Expand

    def reclaim(self, volume_id: str, paths: Sequence[str], *, is_block: bool, deadline: Deadline) -> int:
        """Discard the free blocks of the filesystem that is mounted at the first path with it; return their bytes.

        A raw block volume is never discarded: only its user knows the free blocks. Raises `NotOffered` for it,
        and where filesystem or device take no discards.
        """
        volume = NodeVolume.of_request(volume_id)
        given = [path for path in paths if path]
        if not given:
            raise MissingField("staging_target_path or volume_path")
        found = None if is_block else self._mount_at(volume, given)
        if found is None or found.node_number is not None:
            raise NotOffered(f"volume {volume} is a raw block volume: only its user knows which blocks are free")
        device, used = self._device_of(volume, found)
        if found.read_only:
            raise PreconditionFailed(f"volume {volume} is mounted read-only at {found.path}: no space is given back")
        dead = self.volumes.probes.dead(found)
        if dead is not None:
            raise PreconditionFailed(f"no space of volume {volume} can be given back: {dead.detail}")
        in_time = deadline.earlier(self.volumes.settings.answer_margin_s)
        with self.volumes.heavy.slot(f"give back free space of volume {volume}", deadline=in_time):
            try:
                trimmed_bytes = self.volumes.filesystems.trim(found.path, used, found.fs_type, deadline=in_time)
            except SystemCallFailed as failure:
                if failure.errno not in _NO_TRIM:
                    raise
                reason = f"its encryption passes no discards on ({DISCARDS} of its StorageClass)"
                if used.number == device.number:
                    reason = f"its {found.fs_type} or its device takes no discards"
                raise NotOffered(f"no space of volume {volume} can be given back: {reason}") from failure
        logger.info("volume %s: %d bytes of free space were given back to the storage", volume, trimmed_bytes)
        return trimmed_bytes

    def _mount_at(self, volume: NodeVolume, paths: Sequence[str]) -> Mount:
        for path in paths:
            mounted = self.volumes.own_mount(volume, path)
            if mounted is not None:
                return mounted
        raise NotFound(f"volume {volume} is not mounted at {' or '.join(paths)}")

    def _device_of(self, volume: NodeVolume, mounted: Mount) -> tuple[Device, Device]:
        """Return the volume's own device, and the mounted one, which may be an opened device over it."""
        device = self._require_device(volume)
        used = self.volumes.encrypted.opened_over(volume, device) or device
        if not self.volumes.ownership.is_live(mounted, used):
            held = self.volumes.ownership.held_by_another(str(mounted.path), volume, mounted)
            raise PreconditionFailed(f"{held}; unstage it and stage it again")
        return device, used

    def _require_device(self, volume: NodeVolume) -> Device:
        device = self.volumes.ownership.device_of(volume)
        if device is None:
            raise PreconditionFailed(f"volume {volume} has no device on this node")
        return device

    def rotate(
        self,
        volume_id: str,
        volume_context: Mapping[str, str],
        secrets: Mapping[str, str],
        *,
        new_passphrase: str,
        is_shared: bool,
        deadline: Deadline,
    ) -> None:
        """Replace the previous passphrase of an open volume by the one in the Secret. May be repeated after a crash."""
        volume = NodeVolume.of_request(volume_id)
        by = encrypted_by(None, volume_context)
        if by is not By.LUKS:
            what = "by the storage: its API changes the passphrase" if by is By.NATIVE else "by nobody"
            raise PreconditionFailed(f"volume {volume} is encrypted {what}: this node has no key to change")
        plan = plan_encryption(by, volume_context, secrets)
        if new_passphrase and new_passphrase != passphrase_in(secrets):
            raise InvalidRequest(
                f"encryption_key: expected secrets.{PASSPHRASE_KEYS[0]}, with which the next stage opens the volume, or"
                " nothing; store the new passphrase in the Secret"
            )
        if plan is None or not plan.previous:
            raise MissingField(f"secrets.{PREVIOUS_KEY} (the passphrase that secrets.{PASSPHRASE_KEYS[0]} replaces)")
        device = self._require_device(volume)
        target = VolumeDevice(volume, device, read_only=False, is_shared=is_shared)
        self.volumes.encrypted.rotate(target, plan, deadline=deadline.earlier(self.volumes.settings.answer_margin_s))
