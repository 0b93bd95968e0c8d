# SPDX-License-Identifier: Apache-2.0
"""CreateVolume, with the initialisation of encryption by the storage."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from csi_driver import capacity as sizes
from csi_driver.controller.capacity import ZoneSelection
from csi_driver.controller.content_source import Source, find_source, history_after_copy
from csi_driver.controller.delete_volume import delete_unreturned
from csi_driver.controller.ports import Clusters, CreateRequest, Management
from csi_driver.controller.snapshots import Snapshots
from csi_driver.controller.validate import check_capabilities, chosen_fs_type, differences
from csi_driver.controller.volume_lookup import described, issued_reference
from csi_driver.controller.volume_metadata import (
    Creation,
    Origin,
    creation_metadata,
    read_attachments,
    read_creation,
    with_inherited,
)
from csi_driver.controller.zones import (
    UNANSWERED,
    ZONE_POOL,
    DuplicateGuard,
    Found,
    ZonePool,
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
    NotOffered,
    OperationPending,
    PreconditionFailed,
    StorageUnavailable,
    Unauthenticated,
    shown,
)
from csi_driver.model import ProvisionedVolume, RequestedSource, volume_name
from csi_driver.parameters.encryption import passphrase_in, required_passphrase
from csi_driver.parameters.storage_class import StorageClassParameters, parse, with_mutable
from csi_driver.publish_context import Encryption
from csi_driver.settings import ControllerSettings
from csi_driver.storage_model import Volume, Vpg

_log = logging.getLogger(__name__)

_FINAL = (
    *(InvalidRequest, NotFound, CapacityOutOfRange, Exhausted, PreconditionFailed, Denied, Unauthenticated, NotOffered),
)
"""Errors after which the provisioner assumes that no volume exists or is being created, and never deletes one.
(kubernetes-csi/external-provisioner, pkg/controller/controller.go, checkError.)"""
_ENCRYPTED = 1
"""`encryption.command.response.result` of a command that succeeded."""


class VpgMissing(InvalidField):
    def __init__(self, name: str) -> None:
        super().__init__("parameters.vpg", name, "an existing volume provisioning group")


class EncryptionNotInitialised(StorageUnavailable):
    def __init__(self, volume: Volume, reason: str) -> None:
        super().__init__(f"encryption of volume {volume.name} is not initialised: {reason}; a retry continues")


@dataclass(slots=True)
class CreateVolume:
    clusters: Clusters
    settings: ControllerSettings
    snapshots: Snapshots
    pool: ZonePool = ZONE_POOL
    selection: ZoneSelection = field(init=False)

    def __post_init__(self) -> None:
        self.selection = ZoneSelection(self.clusters, self.settings, self.pool)

    def create(self, request: CreateRequest, *, deadline: Deadline) -> ProvisionedVolume:
        """Create the volume, or find it if an earlier call created it, and wait until it is usable.

        Raises `StorageUnavailable` or `OperationPending` whenever an earlier call left the volume, or may have.
        """
        check_capabilities(request.capabilities)
        parameters = parse(with_mutable(request.parameters, request.mutable_parameters), request.capabilities)
        parameters.encryption.check_access(request.capabilities)
        fs_type = chosen_fs_type(request.capabilities, parameters.fs_type)
        if parameters.ignored:
            _log.warning(
                "volume %s: its provisioning group %s decides, so %s is ignored",
                *(shown(request.name), parameters.spec.vpg, ", ".join(parameters.ignored)),
            )
        creation = Creation(
            csi_name=request.name,
            fs_type=fs_type,
            is_block=fs_type is None,
            parameters=parameters.recorded,
            is_ours=True,
            capacity=request.capacity,
            modes=frozenset(capability.mode for capability in request.capabilities),
            header_bytes=parameters.encryption.header_bytes if parameters.encryption.by is Encryption.LUKS else 0,
            origin=Origin(request.source) if request.source is not None else None,
        )
        zones = allowed_zones(self.clusters.zones(), request.topology, self.settings.topology_key)
        guard = DuplicateGuard(self.clusters, self.settings.allow_zone_skip, self.pool)
        call = _Call(self, request, volume_name(request.name), parameters, creation, zones, deadline, guard)
        try:
            return call.find_or_create()
        except _FINAL as problem:
            return call.continue_after(problem)


@dataclass(slots=True)
class _Call:
    use_case: CreateVolume
    request: CreateRequest
    name: str
    parameters: StorageClassParameters
    creation: Creation
    zones: Sequence[str]
    deadline: Deadline
    guard: DuplicateGuard
    key_command: int | None = None
    """Index of the latest command on the volume's keys before the passphrase was sent; None: not sent in this wait."""
    source: Source | None = None

    def find_or_create(self) -> ProvisionedVolume:
        if self.request.source is not None:
            return self._find_or_copy(self.request.source)
        found = self.guard.find(self.name, self.request.name, self.zones, deadline=self.deadline)
        if isinstance(found, Found):
            return self._finish(found)
        if not found:
            raise StorageUnavailable(f"no response of any of the zones {', '.join(self.zones)}")
        refusals: dict[str, Exhausted | VpgMissing] = {}
        order = self.use_case.selection.order(
            found, self.request, name=self.name, parameters=self.parameters, deadline=self.deadline
        )
        for zone in order:
            try:
                made = self._create_in(zone)
            except (Exhausted, VpgMissing) as refusal:  # only then it is certain that nothing was created
                refusals[zone] = refusal
                _log.info("zone %s cannot create volume %s: %s", zone, self.name, refusal)
                continue
            return self._finish_created(zone, made)
        raise _refused_by_all(refusals)

    def _find_or_copy(self, requested: RequestedSource) -> ProvisionedVolume:
        """Find the volume before its source, which may be deleted when the copy exists; else copy the source."""
        found = self.guard.existing(self.name, self.request.name, self.zones, deadline=self.deadline)
        if found is not None:
            return self._finish(found)
        self.source = source = find_source(self.use_case.snapshots, requested, deadline=self.deadline)
        if source.zone not in self.zones:
            raise Exhausted(
                f"accessibility_requirements: expected zone {shown(source.zone)}, where {source} is, got "
                f"{', '.join(map(shown, self.zones))}; use a node or a StorageClass of that zone"
            )
        self.creation = replace(self.creation, origin=source.origin)
        return self._finish_created(source.zone, self._create_in(source.zone))

    def continue_after(self, problem: DriverError) -> ProvisionedVolume:
        """Finish the volume that an earlier call left, when the request was still valid; else raise `problem`."""
        try:
            found = self.guard.existing(self.name, self.request.name, self.zones, deadline=self.deadline)
        except UNANSWERED as silence:
            reasons = "; ".join(dict.fromkeys((str(problem), str(silence))))
            raise StorageUnavailable(f"{reasons}; it is unknown whether volume {self.name} exists") from problem
        if found is None or not found.has_name(self.request.name):
            raise problem
        try:
            return self._finish(found)
        except _FINAL as again:
            raise StorageUnavailable(f"volume {self.name} exists, but is not usable yet: {again}") from problem

    def _create_in(self, zone: str) -> Volume | str | None:
        management, parameters = served(self.use_case.clusters, zone), self.parameters
        layout, encryption = parameters.spec.layout, parameters.encryption
        if layout is None:
            group = self._group(management)
            if group is None:
                return None
            layout, encryption = group.layout, encryption.in_group(group)
        capacity, source = self.request.capacity, self.source
        if source is not None:
            source.check_encryption(encryption)
            capacity = source.capacity(capacity, encryption.header_bytes)
        elif encryption.is_native:
            required_passphrase(self.request.secrets)
        if encryption.by is Encryption.NONE and passphrase_in(self.request.secrets) is not None:
            _log.warning(
                "volume %s has a passphrase in its Secret but encryption is not enabled; set the encryption parameter",
                self.name,
            )
        size = sizes.size_to_create(capacity, layout, encryption.header_bytes)
        spec = replace(
            parameters.spec,
            name=self.name,
            capacity_gb=sizes.gigabytes_to_create(size, layout),
            metadata=creation_metadata(self._creation_in(zone)),
            encrypted_header_bytes=encryption.header_bytes if encryption.is_native else 0,
            source=source.content if source is not None else None,
        )
        try:
            return management.create_volume(spec, deadline=self.deadline)
        except Exhausted as problem:
            reason = f"{problem}{self._names_to_check()}"
            raise Exhausted(f"no space for a volume of {size} bytes ({layout.raid_level}): {reason}") from problem

    def _creation_in(self, zone: str) -> Creation:
        reference = issued_reference(zone, self.name, self.parameters.pvc_namespace)
        return replace(self.creation, zone=zone, reference=reference)

    def _group(self, management: Management) -> Vpg | None:
        name = self.parameters.spec.vpg or ""
        vpg = management.vpg(name, deadline=self.deadline)
        if vpg is None and management.volume(self.name, deadline=self.deadline) is None:
            raise VpgMissing(name)
        if vpg is not None and vpg.is_for_metadata:
            expected = "a group for volumes, not for metadata of snapshots (type METADATA_VOLUME)"
            raise InvalidField("parameters.vpg", name, expected)
        return vpg

    def _names_to_check(self) -> str:
        """Return a hint at names of drives and targets: a management answers "no space" if they do not exist."""
        spec = self.parameters.spec
        given = {"limitByDisks": spec.limit_by_drives, "limitByNodes": spec.limit_by_targets}
        names = [f"{key} {', '.join(map(shown, some))}" for key, some in given.items() if some]
        names += [f"domain {shown(spec.domain)}"] if spec.domain is not None else []
        if not names:
            return ""
        return f"; the management answers the same for unknown names: check {' and '.join(names)}"

    def _finish_created(self, zone: str, made: Volume | str | None) -> ProvisionedVolume:
        """Prove that no other zone has the volume, and finish it. `made`: the volume of this call, or its uuid."""
        management = served(self.use_case.clusters, zone)
        volume = made if isinstance(made, Volume) else management.volume(self.name, deadline=self.deadline)
        if volume is None:
            raise OperationPending(f"volume {self.name}: the name is reserved by a pending operation; retry")
        found = Found(zone, volume, read_creation(volume.metadata), management)
        # With another uuid, ours was deleted and created again by another call: like any existing volume.
        is_ours = made is volume or (isinstance(made, str) and volume.uuid.lower() == made.lower())
        if is_ours:
            _log.info(
                "created volume %s, uuid %s, %d bytes, zone %s", volume.name, volume.uuid, volume.size_bytes, zone
            )
            self.guard.confirm(found, self.zones, deadline=self.deadline)
        elif not self.guard.is_single:
            again = self.guard.existing(self.name, self.request.name, self.zones, deadline=self.deadline)
            if again is None:
                raise OperationPending(f"volume {self.name} was deleted concurrently; retry")
            found = again
        return self._finish(found, is_new=is_ours)

    def _finish(self, found: Found, *, is_new: bool = False) -> ProvisionedVolume:
        """Prove that the volume is the requested one, wait until it is usable, and answer as the first time.

        A volume that is new, or ours and still too small, was never returned: out of the range, it is deleted.
        """
        management, volume, creation = found.management, found.volume, found.creation
        if volume.is_being_deleted:
            raise OperationPending(f"volume {volume.name} is being deleted; retry when it is gone")
        if creation.csi_name != self.request.name:
            owner = "none" if creation.csi_name is None else shown(creation.csi_name)
            name = f"CSI name: expected {shown(self.request.name)}, got {owner}"
            raise ExistsDifferently(f"volume {volume.name}", [name])
        reserved = found.reserved_bytes if creation.is_ours else 0
        is_short = self._is_short(volume, creation, volume.size_bytes - reserved)
        size = None if is_short else volume.size_bytes - reserved
        vpg = self.parameters.spec.vpg
        different = differences(self._creation_in(found.zone), creation, volume, vpg, size_bytes=size)
        if self.parameters.encryption.is_native and not volume.is_encrypted:
            different.append("encryption by the storage: expected enabled, got disabled")
        if different:
            raise ExistsDifferently(f"volume {shown(self.request.name)}", different)
        never_returned = is_new or (is_short and creation.is_ours)
        if never_returned:
            self._delete_if_out_of_range(management, volume, reserved)
        volume = self._wait_until_usable(management, volume)
        if is_short:
            more = sizes.extension(volume, self.request.capacity, reserved)
            if more is not None:
                management.extend_volume(volume, more.capacity_gb, deadline=self.deadline)
                volume = management.volume(volume.name, deadline=self.deadline) or volume
            if never_returned:
                self._delete_if_out_of_range(management, volume, reserved)
        if creation.origin is not None and creation.origin.history is None:
            self._record_history(management, volume, creation.origin, is_new=is_new)
        return described(found.zone, volume, ({self.use_case.settings.topology_key: found.zone},))

    def _record_history(self, management: Management, volume: Volume, origin: Origin, *, is_new: bool) -> None:
        history = history_after_copy(management, origin, deadline=self.deadline)
        # An existing volume may have been returned by another call meanwhile, and attached: keep its record.
        latest = volume if is_new else management.volume(volume.name, deadline=self.deadline)
        if latest is None or latest.uuid != volume.uuid:
            raise OperationPending(f"volume {volume.name} was deleted while being created; retry")
        management.set_metadata(latest, with_inherited(latest.metadata, history), deadline=self.deadline)

    def _is_short(self, volume: Volume, creation: Creation, size_bytes: int) -> bool:
        """Return whether it came out too small: by the rounding of earlier drivers, or a group that changed."""
        missing = self.request.capacity.required_bytes - size_bytes
        if missing <= 0:
            return False
        if creation.is_ours:
            return creation.capacity == self.request.capacity
        return missing <= sizes.granule_bytes(volume.layout)

    def _wait_until_usable(self, management: Management, volume: Volume) -> Volume:
        latest = volume
        self.key_command = None

        def is_ready() -> bool:
            return not latest.is_being_made and self._is_encrypted(management, latest)

        def is_usable() -> bool:
            nonlocal latest
            if is_ready():
                return True
            present = management.volume(volume.name, deadline=self.deadline)
            if present is None or present.uuid != volume.uuid or present.is_being_deleted:
                raise OperationPending(f"volume {volume.name} was deleted while being created; retry")
            latest = present
            return is_ready()

        settings = self.use_case.settings
        if not settings.wait(self.deadline, settings.usable_wait_s).wait_until(is_usable):
            raise DeadlineReached(f"volume {volume.name} to be usable (status {latest.status}, action {latest.action})")
        return latest

    def _delete_if_out_of_range(self, management: Management, volume: Volume, reserved: int) -> None:
        try:
            sizes.extension(volume, self.request.capacity, reserved)
        except CapacityOutOfRange as reason:
            settings = self.use_case.settings
            wait = settings.wait(self.deadline, settings.usable_wait_s)
            delete_unreturned(management, volume, str(reason), wait=wait, deadline=self.deadline)
            raise CapacityOutOfRange(
                f"the management created a volume of {volume.size_bytes} bytes, which was deleted: {reason}"
            ) from reason

    def _is_encrypted(self, management: Management, volume: Volume) -> bool:
        """Return whether the encryption is initialised or the volume has none; send the passphrase once in a wait.

        Such a volume cannot be attached before a storage target has written the header. After a failure nothing is
        deleted, and a retry with a corrected Secret continues: the errors are not final for the provisioner.
        """
        state = volume.encryption
        if state is None or state.is_initialized:
            return True
        if not volume.wants_passphrase:
            return False
        if self.key_command is None:
            self.key_command = state.command_index
            self._send_passphrase(management, volume)
        elif state.command_index > self.key_command and state.command_result not in (None, _ENCRYPTED):
            error = state.command_error.replace(required_passphrase(self.request.secrets), "[passphrase]")
            reason = f"{state.command_result} ({shown(error) if error else 'no reason given'})"
            raise EncryptionNotInitialised(volume, f"the storage answers {reason}")
        return False

    def _send_passphrase(self, management: Management, volume: Volume) -> None:
        # The server refuses this too; a header over data would destroy it.
        creation = read_creation(volume.metadata)
        if creation.origin is not None or volume.reservation.version != 1 or read_attachments(volume.metadata).number:
            raise EncryptionNotInitialised(volume, "it has content, or was attached before; delete it")
        passphrase, own = required_passphrase(self.request.secrets), self.parameters.encryption
        try:
            is_sent = management.init_encryption(
                volume, passphrase, slot=own.slot, key_size_bits=own.key_size_bits, deadline=self.deadline
            )
        except InvalidRequest as refusal:
            raise EncryptionNotInitialised(volume, str(refusal)) from refusal
        if is_sent:
            _log.info("sent the passphrase of volume %s, uuid %s, to the storage", volume.name, volume.uuid)


def _refused_by_all(refusals: Mapping[str, Exhausted | VpgMissing]) -> DriverError:
    if len(refusals) == 1:
        return next(iter(refusals.values()))
    text = "; ".join(f"zone {zone}: {refusal}" for zone, refusal in refusals.items())
    has_full_one = any(isinstance(refusal, Exhausted) for refusal in refusals.values())
    return Exhausted(text) if has_full_one else InvalidRequest(text)
