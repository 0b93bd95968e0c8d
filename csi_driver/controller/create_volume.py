"""CreateVolume."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from csi_driver import capacity as sizes
from csi_driver.controller.capacity import ZoneSelection
from csi_driver.controller.duplicate_guard import DuplicateGuard, Found
from csi_driver.controller.native_encryption import NativeEncryption
from csi_driver.controller.ports import Clusters, CreateRequest, Management
from csi_driver.controller.validate import check_capabilities, chosen_fs_type, differences, is_short
from csi_driver.controller.volume_lookup import described, issued_reference
from csi_driver.controller.volume_metadata import (
    AttachmentRecord,
    Creation,
    creation_metadata,
    read_attachments,
    read_creation,
    reserved_bytes,
)
from csi_driver.controller.waiting import within
from csi_driver.controller.zones import (
    CREW,
    UNANSWERED,
    Crew,
    allowed_zones,
    served,
)
from csi_driver.deadline import Deadline
from csi_driver.errors import (
    CapacityOutOfRange,
    DeadlineReached,
    Denied,
    DriverError,
    Exhausted,
    ExistsDifferently,
    InvalidField,
    InvalidRequest,
    NotFound,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
    Unauthenticated,
    shown,
)
from csi_driver.model import CapacityRange, ProvisionedVolume, volume_name
from csi_driver.parameters import storage_class
from csi_driver.parameters.encryption import EncryptionRequest, passphrase_in, required_passphrase
from csi_driver.parameters.storage_class import StorageClassParameters
from csi_driver.publish_context import Encryption
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Layout, Reservation, Volume, VolumeSpec, Vpg

_log = logging.getLogger(__name__)

_FINAL = (InvalidRequest, NotFound, CapacityOutOfRange, Exhausted, PreconditionFailed, Denied, Unauthenticated)
"""What the orchestrator takes for "nothing was made, and nothing is being made": it never comes back to such a volume.
(kubernetes-csi/external-provisioner, pkg/controller/controller.go, checkError.)"""


class VpgMissing(InvalidField):
    """A zone has no volume provisioning group of this name; another one may."""

    def __init__(self, name: str) -> None:
        super().__init__("parameters.vpg", name, "an existing volume provisioning group")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A CreateVolume request, understood."""

    csi_name: str
    name: str
    capacity: CapacityRange
    parameters: StorageClassParameters
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


class CreateVolume:
    """Make volumes and delete them. Keeps no state: several controllers may do the same at once."""

    def __init__(
        self,
        clusters: Clusters,
        settings: ControllerSettings,
        *,
        crew: Crew = CREW,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._clusters = clusters
        self._settings = settings
        self._wall_s = wall_s
        self._search = DuplicateGuard(clusters, settings, crew, wall_s)
        self._placement = ZoneSelection(clusters, settings.zone_policy, crew)

    def create(self, request: CreateRequest, *, deadline: Deadline) -> ProvisionedVolume:
        """Make the volume, or find it again when it was made before, and wait until it is usable.

        Raises `ExistsDifferently` naming each difference, `Exhausted` when no allowed zone has room,
        `CapacityOutOfRange`, `InvalidRequest`, and `StorageUnavailable` or `OperationPending` when the same call must
        come again: always, where an earlier call has left the volume behind, or may have.
        """
        wanted = _understood(request)
        zones = allowed_zones(self._clusters.zones(), request.topology, self._settings.topology_key)
        try:
            return self._found_or_made(request, wanted, zones, deadline=deadline)
        except _FINAL as problem:
            return self._left_behind(problem, wanted, zones, deadline=deadline)

    def _left_behind(
        self, problem: DriverError, wanted: _Wanted, zones: Sequence[str], *, deadline: Deadline
    ) -> ProvisionedVolume:
        """Go on with the volume that an earlier call left, although it could not be made now; else raise the problem.

        What was right then may be wrong now: a Secret lost its key, a group changed, the storage is full.
        """
        try:
            found = self._left_in(wanted, zones, deadline=deadline)
        except UNANSWERED as silence:
            reasons = "; ".join(dict.fromkeys((str(problem), str(silence))))
            raise StorageUnavailable(f"{reasons}; it is unknown whether volume {wanted.name} exists") from problem
        if found is None:
            raise problem
        try:
            return self._finish(found.zone, wanted, found.volume, deadline=deadline)
        except _FINAL as again:
            raise StorageUnavailable(f"volume {wanted.name} exists, but is not usable yet: {again}") from problem

    def _left_in(self, wanted: _Wanted, zones: Sequence[str], *, deadline: Deadline) -> Found | None:
        """Return the volume of this CSI name, None where there is none."""
        if not self._is_alone():
            found = self._search.find(wanted.name, wanted.csi_name, zones, deadline=deadline)
        else:
            volume = self._management(zones[0]).volume(wanted.name, deadline=deadline)
            found = Found(zones[0], volume) if volume is not None else []
        return found if isinstance(found, Found) and found.is_of(wanted.csi_name) else None

    def _found_or_made(
        self, request: CreateRequest, wanted: _Wanted, zones: Sequence[str], *, deadline: Deadline
    ) -> ProvisionedVolume:
        key = self._settings.topology_key
        if not self._is_alone():
            # Nothing is made anywhere before each allowed zone has said that it does not have the volume.
            found = self._search.find(wanted.name, wanted.csi_name, zones, deadline=deadline)
            if isinstance(found, Found):
                return self._finish(found.zone, wanted, found.volume, deadline=deadline)
            if not found:
                raise StorageUnavailable(f"no response of any of the zones {', '.join(zones)}")
            zones = self._placement.order(
                found, request.topology, key, name=wanted.name, size_bytes=wanted.capacity.required_bytes,
                parameters=wanted.parameters, deadline=deadline,
            )  # fmt: skip
        return self._create_in_first(zones, wanted, deadline=deadline)

    def _is_alone(self) -> bool:
        """Tell whether there is one zone, so that the storage itself keeps every name single."""
        return len(self._clusters.zones()) == 1

    def _create_in_first(self, zones: Sequence[str], wanted: _Wanted, *, deadline: Deadline) -> ProvisionedVolume:
        """Make the volume in the first zone that can have it.

        The next one is tried only where this one refused, so that it is certain that it made nothing.
        """
        refusals: dict[str, Exhausted | VpgMissing] = {}
        for zone in zones:
            sent_at_s = deadline.clock.monotonic()
            try:
                made = self._made_in(zone, wanted, deadline=deadline)
            except (Exhausted, VpgMissing) as refusal:
                refusals[zone] = refusal
                _log.info("zone %s cannot create volume %s: %s", zone, wanted.name, refusal)
                continue
            return self._answer(zone, zones, wanted, made, sent_at_s, deadline=deadline)
        raise _refused_by_all(refusals)

    def _made_in(self, zone: str, wanted: _Wanted, *, deadline: Deadline) -> str | None:
        """Make the volume and return its uuid; None when one of that name is there."""
        management = self._management(zone)
        layout, encryption = wanted.parameters.spec.layout, wanted.parameters.encryption
        if layout is None:
            group = self._group(management, wanted, deadline=deadline)
            if group is None:
                return None
            layout, encryption = group.layout, encryption.in_group(group)
        if encryption.is_native:
            required_passphrase(wanted.secrets)
        elif encryption.by is Encryption.NONE and passphrase_in(wanted.secrets) is not None:
            _log.warning(
                "volume %s has a passphrase in its Secret but encryption is not enabled; set the encryption parameter",
                wanted.name,
            )
        size = sizes.size_to_create(wanted.capacity, layout, encryption.header_bytes)
        creation = replace(wanted.in_zone(zone), made_at_s=int(self._wall_s()), maker=self._search.maker)
        try:
            return management.create_volume(_spec(wanted, creation, size, layout, encryption), deadline=deadline)
        except Exhausted as problem:
            raise Exhausted(
                f"no space for a volume of {size} bytes ({layout.raid_level}): {problem}{_names_to_check(wanted)}"
            ) from problem

    def _answer(
        self, zone: str, allowed: Sequence[str], wanted: _Wanted, uuid: str | None, sent_at_s: float, *,
        deadline: Deadline,
    ) -> ProvisionedVolume:  # fmt: skip
        """Prove that the volume is the only one, and finish it. `uuid`: of the one that this call made, if it did."""
        volume = self._management(zone).volume(wanted.name, deadline=deadline)
        if volume is None:
            raise OperationPending(f"volume {wanted.name}: the name is reserved by a pending operation; retry")
        is_ours = uuid is not None and volume.uuid.lower() == uuid.lower()
        if is_ours:
            _log.info("created volume %s, uuid %s, %d bytes, zone %s", volume.name, uuid, volume.size_bytes, zone)
        # Another uuid: ours was deleted and somebody made it again. Then it is an existing volume like any other.
        if not self._is_alone():
            if is_ours:
                self._search.confirm(Found(zone, volume), allowed, sent_at_s, deadline=deadline)
            else:
                found = self._search.find(wanted.name, wanted.csi_name, allowed, deadline=deadline)
                if not isinstance(found, Found):
                    raise OperationPending(f"volume {wanted.name} was deleted concurrently; retry")
                zone, volume = found.zone, found.volume
        return self._finish(zone, wanted, volume, is_new=is_ours, deadline=deadline)

    def _group(self, management: Management, wanted: _Wanted, *, deadline: Deadline) -> Vpg | None:
        """Return the provisioning group; None where it went after the volume was made."""
        name = wanted.parameters.spec.vpg or ""
        vpg = management.vpg(name, deadline=deadline)
        if vpg is None and management.volume(wanted.name, deadline=deadline) is None:
            raise VpgMissing(name)
        if vpg is not None and vpg.is_for_metadata:
            what = "a group for volumes, not for metadata of snapshots (type METADATA_VOLUME)"
            raise InvalidField("parameters.vpg", name, what)
        return vpg

    def _finish(
        self, zone: str, wanted: _Wanted, volume: Volume, *, is_new: bool = False, deadline: Deadline
    ) -> ProvisionedVolume:
        """Prove that the volume is the one wanted, wait until it can be used, and answer as the first time.

        `is_new`: this call made it. A volume that is new, or that this driver made and that is still smaller than
        required, was never returned by any call: where it cannot come into the requested range, it is deleted.
        """
        management = self._management(zone)
        creation = read_creation(volume.metadata)
        if volume.is_being_deleted:
            raise OperationPending(f"volume {volume.name} is being deleted; retry when it is gone")
        if creation.csi_name != wanted.csi_name:
            owner = "none" if creation.csi_name is None else shown(creation.csi_name)
            raise ExistsDifferently(
                f"volume {volume.name}", [f"CSI name: expected {shown(wanted.csi_name)}, got {owner}"]
            )
        size = volume.size_bytes - (reserved_bytes(volume, creation) if creation.is_ours else 0)
        short = is_short(wanted.capacity, creation, size, sizes.granule_bytes(volume.layout))
        vpg = wanted.parameters.spec.vpg
        different = differences(wanted.in_zone(zone), creation, volume, vpg, size_bytes=size, judge_size=not short)
        if wanted.parameters.encryption.is_native and not volume.is_encrypted:
            different.append("encryption by the storage: expected enabled, got disabled")
        if different:
            raise ExistsDifferently(f"volume {shown(wanted.csi_name)}", different)
        never_returned = is_new or (short and creation.is_ours)
        if never_returned:
            self._discard_out_of_range(management, wanted, volume, deadline=deadline)
        volume = self._usable(management, wanted, volume, deadline=deadline)
        if short:
            volume = self._lengthened(management, wanted, volume, deadline=deadline)
            if never_returned:
                self._discard_out_of_range(management, wanted, volume, deadline=deadline)
        return described(zone, volume, creation, self._settings.topology_key)

    def _usable(self, management: Management, wanted: _Wanted, volume: Volume, *, deadline: Deadline) -> Volume:
        latest = volume
        keying = NativeEncryption(management, wanted.parameters.encryption, wanted.secrets)

        def is_ready() -> bool:
            return not latest.is_being_made and keying.is_done(latest, deadline=deadline)

        def is_usable() -> bool:
            nonlocal latest
            if is_ready():
                return True
            present = management.volume(volume.name, deadline=deadline)
            if present is None or present.uuid != volume.uuid or present.is_being_deleted:
                raise OperationPending(f"volume {volume.name} was deleted while being created; retry")
            latest = present
            return is_ready()

        if not self._wait(deadline).wait_until(is_usable):
            raise DeadlineReached(
                f"volume {volume.name} to become usable (status {latest.status}, action {latest.action})"
            )
        return latest

    def _lengthened(self, management: Management, wanted: _Wanted, volume: Volume, *, deadline: Deadline) -> Volume:
        """Add what the volume is short of, so that it is as large as was asked for when it was made."""
        more = _missing(wanted, volume)
        if more is None:
            return volume
        management.extend_volume(volume, more.capacity_gb, deadline=deadline)
        return management.volume(volume.name, deadline=deadline) or volume

    def _discard_out_of_range(
        self, management: Management, wanted: _Wanted, volume: Volume, *, deadline: Deadline
    ) -> None:
        """Delete a volume that was never returned and that no extension brings into the range; then raise.

        Nobody can use it: it was never attached, by its reservation, its record and all clients, and nobody has its
        handle. Returns for any other volume.
        """
        try:
            _missing(wanted, volume)
            return
        except CapacityOutOfRange as problem:
            reason = problem

        def is_gone() -> bool:
            present = management.volume(volume.name, deadline=deadline)
            if present is None or present.uuid != volume.uuid or present.is_being_deleted:
                return True
            is_used = present.reservation != Reservation() or read_attachments(present.metadata) != AttachmentRecord()
            if is_used or management.clients_holding(present.uuid, deadline=deadline):
                raise PreconditionFailed(
                    f"volume {volume.name} has {volume.size_bytes} bytes: {reason}; it was attached and is kept"
                )
            try:
                management.delete_volume(present, deadline=deadline)
            except OperationPending:  # it is not ready to be deleted yet
                return False
            return True

        if not self._wait(deadline).wait_until(is_gone):
            raise OperationPending(
                f"volume {volume.name} has {volume.size_bytes} bytes: {reason}; it cannot be deleted yet; retry"
            )
        _log.info(
            "deleted volume %s, uuid %s, which no call returned: its %d bytes are out of the requested range",
            volume.name,
            volume.uuid,
            volume.size_bytes,
        )
        raise CapacityOutOfRange(
            f"the management created a volume of {volume.size_bytes} bytes, which was deleted: {reason}"
        ) from reason

    def _management(self, zone: str) -> Management:
        return served(self._clusters, zone)

    def _wait(self, deadline: Deadline) -> Deadline:
        return within(deadline, self._settings.usable_wait_s, margin_s=self._settings.answer_margin_s)


def _missing(wanted: _Wanted, volume: Volume) -> sizes.Extension | None:
    """Return the extension that brings a volume into the requested range; None where it lies in it.

    Raises `CapacityOutOfRange` where none does.
    """
    creation = read_creation(volume.metadata)
    reserved = reserved_bytes(volume, creation) if creation.is_ours else 0
    return sizes.extension(volume, wanted.capacity, reserved)


def _understood(request: CreateRequest) -> _Wanted:
    check_capabilities(request.capabilities)
    read = storage_class.parse(
        storage_class.with_mutable(request.parameters, request.mutable_parameters), request.capabilities
    )
    read.encryption.check_access(request.capabilities)
    fs_type = chosen_fs_type(request.capabilities, read.fs_type)
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


def _tell(request: CreateRequest, read: StorageClassParameters) -> None:
    """Say in the log what is done otherwise than the parameters may have meant."""
    name = shown(request.name)
    if read.ignored:
        ignored = ", ".join(read.ignored)
        _log.warning("volume %s: its provisioning group %s decides, so %s is ignored", name, read.spec.vpg, ignored)


def _refused_by_all(refusals: Mapping[str, Exhausted | VpgMissing]) -> DriverError:
    """Return why no zone made the volume: room may come, a group that is named wrongly will not."""
    if len(refusals) == 1:
        return next(iter(refusals.values()))
    text = "; ".join(f"zone {zone}: {refusal}" for zone, refusal in refusals.items())
    has_full_one = any(isinstance(refusal, Exhausted) for refusal in refusals.values())
    return Exhausted(text) if has_full_one else InvalidRequest(text)


def _names_to_check(wanted: _Wanted) -> str:
    """Return a hint at names of drives and targets: a management answers "no space" where they do not exist."""
    read = wanted.parameters
    given = {"limitByDisks": read.spec.limit_by_drives, "limitByNodes": read.spec.limit_by_targets}
    names = [f"{key} {', '.join(map(shown, some))}" for key, some in given.items() if some]
    names += [f"domain {shown(read.spec.domain)}"] if read.spec.domain is not None else []
    if not names:
        return ""
    return f"; the management answers the same for unknown names: check {' and '.join(names)}"


def _spec(
    wanted: _Wanted, creation: Creation, size_bytes: int, layout: Layout, encryption: EncryptionRequest
) -> VolumeSpec:
    return replace(
        wanted.parameters.spec,
        name=wanted.name,
        capacity_gb=sizes.gigabytes_to_create(size_bytes, layout),
        metadata=creation_metadata(creation),
        encrypted_header_bytes=encryption.header_bytes if encryption.is_native else 0,
    )
