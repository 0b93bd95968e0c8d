"""Whether this node still holds a volume that it has staged, told without asking the management.

A node that was lost and comes back may find that another one has taken its volume over. The storage has cut its I/O
then; what is mounted here is dead and must go, so that nothing that was not yet written can ever be flushed to a volume
that is somebody else's by now. Three things on this machine tell it, and none of them touches the device: what the
storage client shows of the volume, the reference ids that it shows, and whether the client shows itself at all. What is
missing for a moment (a client that starts, or is upgraded under its volumes) tells nothing.

A client that was preempted says so itself, and goes on showing its reference ids: the management cannot detach it while
anything here has the device open.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from csi_driver.host_model import Device, StorageClient, VolumeStatus
from csi_driver.model import VolumeHandle
from csi_driver.publish_context import held_reference


class Shown(Protocol):
    """What the storage client of this machine shows; `csi_driver.node.ports.Devices` fits."""

    def client(self) -> StorageClient: ...

    def status(self, name: str) -> VolumeStatus | None: ...

    def reference_ids(self, name: str) -> tuple[str, ...] | None: ...

    def find(self, name: str, uuid: str | None = None) -> Device | None: ...


class Hold(Enum):
    """How a volume is held on this node, under one reference.

    WITHDRAWN: under this reference no more, but its device may carry I/O: others here use it, or it was detached while
    it was in use, and waits for its last user. FENCED: no more, and no I/O reaches the storage: whatever is
    mounted is dead. UNKNOWN: nothing here tells it at this moment; not a reason to touch anything.
    """

    HELD = "held"
    WITHDRAWN = "given up, but in use"
    FENCED = "taken by another node, or detached by force"
    UNKNOWN = "not known"


def hold_of(shown: Shown, handle: VolumeHandle, uuid: str) -> Hold:
    """Tell how this node holds the volume `uuid` under the handle's reference.

    `uuid` is that of the volume that was staged. Where the name is another volume's by now, the staged one is held no
    more; what became of its device that does not tell.
    """
    client = shown.client()
    if client.uuid is None or client.is_upgrading or client.problem:
        return Hold.UNKNOWN
    status, references = shown.status(handle.name), shown.reference_ids(handle.name)
    if status is None:
        # The client runs and shows its volumes; with neither files nor a device this one is no longer among them.
        is_gone = references is None and shown.find(handle.name, uuid) is None
        return Hold.FENCED if is_gone else Hold.UNKNOWN
    if status.uuid != uuid.lower():
        return Hold.WITHDRAWN
    if status.preempted:
        return Hold.FENCED
    if references is None:
        return Hold.UNKNOWN
    if held_reference(handle, uuid.lower()) in references:
        return Hold.HELD
    return Hold.FENCED if status.io_enabled is False else Hold.WITHDRAWN


def is_cut_off(shown: Shown, name: str) -> bool:
    """Tell whether a volume of which only the name is known is certainly dead here: nobody's, and cut off.

    Whatever handle it was staged under: it was preempted, or no reference at all is left. Ask twice, as of `is_fenced`.
    """
    client = shown.client()
    if client.uuid is None or client.is_upgrading or client.problem:
        return False
    status = shown.status(name)
    if status is None or status.io_enabled is not False:
        return False
    return status.preempted or shown.reference_ids(name) == ()


def is_fenced(shown: Shown, handle: VolumeHandle, uuid: str) -> bool:
    """Tell whether what is staged of the volume is certainly dead: held no more, and cut off from the storage.

    Then it may be unmounted lazily: nothing that is still to be written can be. Ask twice, with time in between, before
    acting: the client's files are written one after the other.
    """
    return hold_of(shown, handle, uuid) is Hold.FENCED
