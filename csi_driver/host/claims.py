"""Whose a device is, by all that speaks on this machine: the client's status, a loop device's label, a serial number.

Pure: what was read is weighed here. All evidence that there is must agree; without any, nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from csi_driver.host.connectors.nvmesh import serial_of
from csi_driver.host_model import VolumeStatus


@dataclass(frozen=True, slots=True)
class Claims:
    """What the evidence says of an open device. None = says nothing."""

    status: VolumeStatus | None
    label_uuid: str | None
    serial: str | None
    is_loop: bool

    def uuid(self) -> str | None:
        """Return the uuid that the device has by this evidence; None when nothing tells it."""
        if self.is_loop:
            return self.label_uuid
        return self.status.uuid if self.status is not None else None

    def uuid_for(self, wanted: str | None) -> str | None:
        """Return the uuid that the device has, where a serial number alone decides whether it is the one `wanted`.

        A serial number holds only a part of a uuid: of another volume it is shown as what it is, and equals no uuid.
        """
        claimed = self.uuid()
        if claimed is not None or self.serial is None or wanted is None:
            return claimed
        return wanted if self.serial == serial_of(wanted) else f"serial number {self.serial}"

    def unusable(self, name: str) -> str | None:
        """Say why the device may carry no I/O at the moment; None when its client says that it does.

        Of a client that shows nothing of the volume at all it is not known, as while that is replaced.
        """
        if self.status is None or self.status.io_enabled is True:
            return None
        return f"the client has not enabled I/O for {name}: {self.status.words}"

    def write_refusal(self) -> str:
        """Repeat what the client says of the volume where writes to it fail; empty where they do not."""
        return self.status.words if self.status is not None and self.status.refuses_writes else ""

    def refusal(self, name: str) -> str | None:
        """Say why the volume's device may not be used at all; None when it may."""
        if self.status is not None and self.status.refusal:
            return f"{name} may not be used: {self.status.refusal}"
        return None

    def disagreement(self, name: str) -> str | None:
        """Say in which way the evidence disagrees with itself or with the name; None when it does not."""
        if self.status is None:
            return None
        if self.status.name != name:
            return f"the client's status of {name} claims the name {self.status.name}, expected {name}"
        if self.label_uuid is not None and self.label_uuid != self.status.uuid:
            return f"{name}: the device claims {self.label_uuid}, expected {self.status.uuid} as the client says"
        expected = serial_of(self.status.uuid)
        if self.serial is not None and self.serial != expected:
            return f"{name}: the device claims the serial number {self.serial}, expected {expected} as the client says"
        return None

    def mismatch(self, name: str, uuid: str | None) -> str | None:
        """Say in which way the evidence speaks against the volume being `uuid`; None when it does not."""
        if uuid is None:
            return None
        claimed = self.uuid()
        if claimed is not None and claimed != uuid:
            return f"{name}: the device claims {claimed}, expected {uuid}"
        if self.serial is not None and self.serial != serial_of(uuid):
            return f"{name}: the device claims the serial number of another volume ({self.serial}), expected {uuid}"
        return None

    def against(self, name: str, uuid: str | None) -> str | None:
        """Say whatever speaks against using the device as this volume; None when nothing does."""
        return self.refusal(name) or self.disagreement(name) or self.mismatch(name, uuid)

    def proves(self) -> bool:
        """Tell whether the device is known to be the volume: by its client's word, or a loop device's own.

        A serial number proves nothing alone: without its client's word it is not known that the device carries I/O.
        """
        return (self.label_uuid if self.is_loop else self.status) is not None
