"""CreateVolume and DeleteVolume."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver import capacity
from csi_driver.controller import access, parameters, record
from csi_driver.controller.compare import differences, is_short
from csi_driver.controller.encryption_parameters import EncryptionWish, passphrase_in, required_passphrase
from csi_driver.controller.handing import reserved_bytes
from csi_driver.controller.keying import Keying
from csi_driver.controller.locate import described, locate
from csi_driver.controller.naming import issued_reference, volume_name
from csi_driver.controller.parameters import VolumeParameters
from csi_driver.controller.placement import allowed_zones
from csi_driver.controller.ports import Clusters, Management
from csi_driver.controller.record import Creation
from csi_driver.controller.requests import ControllerSettings, CreateRequest
from csi_driver.controller.waiting import within
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    DeadlineReached,
    Exhausted,
    ExistsDifferently,
    InvalidField,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
    shown,
)
from csi_driver.handover import Encryption
from csi_driver.model import CapacityRange, Layout, ProvisionedVolume, Volume, VolumeHandle, VolumeSpec, Vpg

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A CreateVolume request, understood."""

    csi_name: str
    name: str
    capacity: CapacityRange
    parameters: VolumeParameters
    creation: Creation
    secrets: Mapping[str, str] = field(repr=False)

    def in_zone(self, zone: str) -> Creation:
        """Return what is recorded of the volume when it is made in this zone."""
        own = self.creation
        return Creation(
            csi_name=own.csi_name,
            fs_type=own.fs_type,
            is_block=own.is_block,
            zone=zone,
            reference=issued_reference(zone, self.name, self.parameters.pvc_namespace),
            parameters=own.parameters,
            is_ours=True,
            capacity=self.capacity,
            modes=own.modes,
            header_bytes=own.header_bytes,
        )


class Provision:
    """Make volumes and delete them. Keeps no state: several controllers may do the same at once."""

    def __init__(self, clusters: Clusters, settings: ControllerSettings) -> None:
        self._clusters = clusters
        self._settings = settings

    def create(self, request: CreateRequest, *, deadline: Deadline) -> ProvisionedVolume:
        """Make the volume, or find it again when it was made before, and wait until it is usable.

        Raises `ExistsDifferently` naming each difference, `Exhausted` when no allowed zone has room,
        `CapacityOutOfRange`, `InvalidRequest` before any request is made, and `DeadlineReached` or `OperationPending`
        when the same call must come again.
        """
        wanted = _understood(request)
        key = self._settings.topology_key
        zones = allowed_zones(self._clusters.zones(), request.topology, key)
        if len(zones) > 1:
            # Nothing is made anywhere before each allowed zone has said that it does not have the volume.
            for zone in zones:
                existing = self._management(zone).volume(wanted.name, deadline=deadline)
                if existing is not None and read_name(existing) == wanted.csi_name:
                    return self._finish(zone, wanted, existing, deadline=deadline)
        return self._create_in_first(zones, wanted, deadline=deadline)

    def delete(self, volume_id: str, *, deadline: Deadline) -> None:
        """Delete the volume and wait until it is gone; success when it does not exist (any more).

        Raises `PreconditionFailed` while anybody holds it, and for a handle that was made from another one by
        changing its last part: a reader's copy of the volume never deletes it.
        """
        located = locate(self._clusters, volume_id, deadline=deadline)
        if located is None:
            return
        management, volume = located.management, located.volume
        if not volume.is_being_deleted:
            _refuse_copy(volume_id, located.handle, located.creation)
            holders = management.clients_holding(volume.uuid, deadline=deadline)
            if holders:
                names = ", ".join(sorted(f"{client.id} ({client.uuid})" for client in holders))
                raise PreconditionFailed(f"volume {shown(volume_id)} is still attached to {names}; wanted it detached")
            if not management.delete_volume(volume, deadline=deadline):
                return
            _log.info("deleted volume %s, uuid %s, zone %s", volume.name, volume.uuid, located.zone)

        def is_gone() -> bool:
            present = management.volume(volume.name, deadline=deadline)
            return present is None or present.uuid != volume.uuid

        if not self._wait(deadline).wait_until(is_gone):
            raise OperationPending(f"volume {volume.name} is being deleted; call again to learn that it is gone")

    def _create_in_first(self, zones: list[str], wanted: _Wanted, *, deadline: Deadline) -> ProvisionedVolume:
        """Make the volume in the first zone that has room for it."""
        for zone in zones[:-1]:
            try:
                return self._create_in(zone, wanted, deadline=deadline)
            except Exhausted as full:
                _log.info("zone %s has no room for volume %s, trying the next: %s", zone, wanted.name, full)
        return self._create_in(zones[-1], wanted, deadline=deadline)

    def _create_in(self, zone: str, wanted: _Wanted, *, deadline: Deadline) -> ProvisionedVolume:
        management = self._management(zone)
        layout, encryption = wanted.parameters.layout, wanted.parameters.encryption
        if layout is None:
            found = self._group(management, wanted, deadline=deadline)
            if isinstance(found, Volume):
                return self._finish(zone, wanted, found, deadline=deadline)
            layout, encryption = found.layout, encryption.in_group(found)
        if encryption.is_native:
            required_passphrase(wanted.secrets)
        size = capacity.size_to_create(capacity.with_reserved(wanted.capacity, encryption.header_bytes), layout)
        spec = _spec(wanted, zone, size, layout, encryption)
        uuid = management.create_volume(spec, deadline=deadline)
        volume = management.volume(wanted.name, deadline=deadline)
        if volume is None:
            raise OperationPending(f"volume {wanted.name} is neither there nor free to be made; call again")
        if uuid is not None and volume.uuid.lower() == uuid.lower():
            _log.info("created volume %s, uuid %s, %d bytes, zone %s", volume.name, uuid, volume.size_bytes, zone)
        # Another uuid: ours was deleted and somebody made it again. Then it is an existing volume like any other.
        return self._finish(zone, wanted, volume, deadline=deadline)

    def _group(self, management: Management, wanted: _Wanted, *, deadline: Deadline) -> Vpg | Volume:
        """Return the provisioning group; or the volume, where the group went after it was made."""
        name = wanted.parameters.vpg or ""
        vpg = management.vpg(name, deadline=deadline)
        if vpg is None:
            volume = management.volume(wanted.name, deadline=deadline)
            if volume is not None:
                return volume
            raise InvalidField("parameters.vpg", name, "a volume provisioning group that exists")
        return vpg

    def _finish(self, zone: str, wanted: _Wanted, volume: Volume, *, deadline: Deadline) -> ProvisionedVolume:
        """Prove that the volume is the one wanted, wait until it can be used, and answer as the first time."""
        management = self._management(zone)
        creation = record.read_creation(volume.metadata)
        if volume.is_being_deleted:
            raise OperationPending(f"volume {volume.name} is being deleted; the name can be used again when it is gone")
        if creation.csi_name != wanted.csi_name:
            owner = "no CSI name" if creation.csi_name is None else f"the CSI name {shown(creation.csi_name)}"
            raise ExistsDifferently(f"volume {volume.name}", [f"it has {owner}, wanted {shown(wanted.csi_name)}"])
        size = volume.size_bytes - (reserved_bytes(volume, creation) if creation.is_ours else 0)
        short = is_short(wanted.capacity, creation, size, capacity.granule_bytes(volume.layout))
        vpg = wanted.parameters.vpg
        different = differences(wanted.in_zone(zone), creation, volume, vpg, size_bytes=size, judge_size=not short)
        if wanted.parameters.encryption.is_native and not volume.is_encrypted:
            different.append("the storage does not encrypt it, wanted it to")
        if different:
            raise ExistsDifferently(f"volume {shown(wanted.csi_name)}", different)
        volume = self._usable(management, wanted, volume, deadline=deadline)
        if short:
            volume = self._lengthened(management, wanted, volume, deadline=deadline)
        return described(zone, volume, creation, self._settings.topology_key)

    def _usable(self, management: Management, wanted: _Wanted, volume: Volume, *, deadline: Deadline) -> Volume:
        latest = volume
        keying = Keying(management, wanted.parameters.encryption, wanted.secrets)

        def is_ready() -> bool:
            return not latest.is_being_made and keying.is_done(latest, deadline=deadline)

        def is_usable() -> bool:
            nonlocal latest
            if is_ready():
                return True
            present = management.volume(volume.name, deadline=deadline)
            if present is None or present.uuid != volume.uuid or present.is_being_deleted:
                raise OperationPending(f"volume {volume.name} was deleted while it was being made; call again")
            latest = present
            return is_ready()

        if not self._wait(deadline).wait_until(is_usable):
            raise DeadlineReached(
                f"volume {volume.name} to become usable (status {latest.status}, action {latest.action})",
                deadline.elapsed_s(),
            )
        return latest

    def _lengthened(self, management: Management, wanted: _Wanted, volume: Volume, *, deadline: Deadline) -> Volume:
        """Add what the volume is short of, so that it is as large as was asked for when it was made."""
        creation = record.read_creation(volume.metadata)
        reserved = reserved_bytes(volume, creation) if creation.is_ours else 0
        more = capacity.extension(volume, capacity.with_reserved(wanted.capacity, reserved))
        if more is None:
            return volume
        management.extend_volume(volume, more.capacity_gb, deadline=deadline)
        return management.volume(volume.name, deadline=deadline) or volume

    def _management(self, zone: str) -> Management:
        management = self._clusters.management(zone)
        if management is None:
            raise StorageUnavailable(f"zone {zone} is not served any more")
        return management

    def _wait(self, deadline: Deadline) -> Deadline:
        return within(deadline, self._settings.usable_wait_s, margin_s=self._settings.answer_margin_s)


def read_name(volume: Volume) -> str | None:
    """Return the CSI name that a volume was made for."""
    return record.read_creation(volume.metadata).csi_name


def _understood(request: CreateRequest) -> _Wanted:
    read = parameters.parse(request.parameters)
    if read.encryption.is_native:
        required_passphrase(request.secrets)
    access.check_all(request.capabilities)
    fs_type = access.chosen_fs_type(request.capabilities, read.fs_type)
    creation = Creation(
        csi_name=request.name,
        fs_type=fs_type,
        is_block=fs_type is None,
        parameters=read.recorded,
        is_ours=True,
        modes=frozenset(capability.mode for capability in request.capabilities),
        header_bytes=read.encryption.header_bytes if read.encryption.by is Encryption.LUKS else 0,
    )
    _tell(request, read)
    return _Wanted(request.name, volume_name(request.name), request.capacity, read, creation, request.secrets)


def _tell(request: CreateRequest, read: VolumeParameters) -> None:
    """Say in the log what is done otherwise than the parameters may have meant."""
    name = shown(request.name)
    if read.ignored:
        ignored = ", ".join(read.ignored)
        _log.warning("volume %s: its provisioning group %s decides, so %s is ignored", name, read.vpg, ignored)
    if read.vpg is None and read.encryption.by is Encryption.NONE and passphrase_in(request.secrets) is not None:
        _log.warning("volume %s is not encrypted: a Secret holds a passphrase, but no parameter asks for it", name)


def _spec(wanted: _Wanted, zone: str, size_bytes: int, layout: Layout, encryption: EncryptionWish) -> VolumeSpec:
    read = wanted.parameters
    return VolumeSpec(
        name=wanted.name,
        capacity_gb=capacity.gigabytes_to_create(size_bytes, layout),
        metadata=record.creation_metadata(wanted.in_zone(zone)),
        vpg=read.vpg,
        layout=read.layout,
        description=read.description,
        relative_rebuild_priority=read.relative_rebuild_priority,
        drive_classes=read.drive_classes,
        target_classes=read.target_classes,
        limit_by_drives=read.limit_by_drives,
        limit_by_targets=read.limit_by_targets,
        domain=read.domain,
        encrypted_header_bytes=encryption.header_bytes if encryption.is_native else 0,
    )


def _refuse_copy(volume_id: str, handle: VolumeHandle, creation: Creation) -> None:
    if handle.reference is None or handle.reference == creation.reference:
        return
    issued = "none" if creation.reference is None else shown(creation.reference)
    raise PreconditionFailed(
        f"volume {shown(volume_id)} was issued with another last part ({issued}): this is a copy of its handle, "
        "and deleting a copy does not delete the volume"
    )
