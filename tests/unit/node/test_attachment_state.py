"""What on this machine tells that a volume was taken from it, and what does not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from csi_driver.host_model import Device, DeviceNumber, StorageClient, VolumeStatus
from csi_driver.model import VolumeHandle
from csi_driver.node.mount_owner import AttachmentState, attachment_state, is_cut_off, is_fenced

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
HANDLE = VolumeHandle("v", "z", UUID, "team-a")
NODE = Device("v", Path("/dev/nvmesh/v"), DeviceNumber(252, 1), 1 << 30, False, UUID)
WORKS, CUT = VolumeStatus("v", UUID, io_enabled=True), VolumeStatus("v", UUID, io_enabled=False)
SILENT = VolumeStatus("v", UUID)
PREEMPTED = VolumeStatus("v", UUID, io_enabled=False, preempted=True)


@dataclass
class Client:
    """A storage client that shows what a test says."""

    its_status: VolumeStatus | None = WORKS
    references: tuple[str, ...] | None = ("team-a",)
    node: Device | None = NODE
    its_client: StorageClient = field(default_factory=lambda: StorageClient("c", is_expected=True))

    def client(self) -> StorageClient:
        return self.its_client

    def status(self, name: str) -> VolumeStatus | None:
        return self.its_status

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        return self.references

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        return self.node


@pytest.mark.parametrize(
    ("client", "hold"),
    [
        (Client(), AttachmentState.ATTACHED),
        (Client(references=("team-b", "team-a")), AttachmentState.ATTACHED),
        # An outage is no fence: the reference is still there.
        (Client(its_status=CUT), AttachmentState.ATTACHED),
        (Client(its_status=CUT, references=()), AttachmentState.FENCED),
        (Client(its_status=CUT, references=("team-b",)), AttachmentState.FENCED),
        # The client keeps its references until it is allowed to detach, which an open device prevents.
        (Client(its_status=PREEMPTED), AttachmentState.FENCED),
        (Client(its_status=PREEMPTED, references=None), AttachmentState.FENCED),
        (Client(its_status=replace(PREEMPTED, uuid=OTHER)), AttachmentState.WITHDRAWN),
        (Client(references=()), AttachmentState.WITHDRAWN),
        (Client(references=("team-b",)), AttachmentState.WITHDRAWN),
        # A client of a version whose words are not known does not say that there is no I/O.
        (Client(its_status=SILENT, references=()), AttachmentState.WITHDRAWN),
        # Another volume under this name: the staged one is not attached here any more.
        (Client(its_status=replace(CUT, uuid=OTHER)), AttachmentState.WITHDRAWN),
        (Client(its_status=CUT, references=None), AttachmentState.UNKNOWN),
        (Client(its_status=None, references=None, node=None), AttachmentState.FENCED),
        # The client's files of this volume are being written, or unreadable.
        (Client(its_status=None, references=None), AttachmentState.UNKNOWN),
        (Client(its_status=None, references=(), node=None), AttachmentState.UNKNOWN),
    ],
)
def test_what_the_client_shows_tells_how_the_volume_is_held(client: Client, hold: AttachmentState) -> None:
    assert attachment_state(client, HANDLE, UUID) is hold


@pytest.mark.parametrize(
    "state",
    [
        StorageClient(None, is_expected=True, is_upgrading=True),
        StorageClient(None, is_expected=True),
        StorageClient(None),
        StorageClient("c", is_upgrading=True),
        StorageClient("c", problem="never registers"),
    ],
)
@pytest.mark.parametrize("status", [None, CUT, WORKS, PREEMPTED])
def test_a_client_that_does_not_show_itself_tells_nothing(state: StorageClient, status: VolumeStatus | None) -> None:
    client = Client(status, None if status is None else (), None, state)
    assert attachment_state(client, HANDLE, UUID) is AttachmentState.UNKNOWN
    assert not is_fenced(client, HANDLE, UUID)


@pytest.mark.parametrize("uuid", [UUID, UUID.upper()])
def test_a_handle_without_a_last_part_is_held_under_the_volumes_uuid(uuid: str) -> None:
    plain = VolumeHandle("v", "z")
    assert attachment_state(Client(references=(UUID,)), plain, uuid) is AttachmentState.ATTACHED
    assert attachment_state(Client(its_status=CUT, references=("team-a",)), plain, uuid) is AttachmentState.FENCED


@pytest.mark.parametrize(
    ("client", "is_cut"),
    [
        (Client(its_status=CUT, references=()), True),
        (Client(its_status=PREEMPTED), True),
        (Client(its_status=PREEMPTED, references=None), True),
        (Client(its_status=PREEMPTED, its_client=StorageClient(None)), False),
        # Held under some reference, or not known under which: an outage, or a client that is not done yet.
        (Client(its_status=CUT, references=("team-b",)), False),
        (Client(its_status=CUT, references=None), False),
        (Client(its_status=SILENT, references=()), False),
        (Client(references=()), False),
        (Client(its_status=None, references=()), False),
        (Client(its_status=CUT, references=(), its_client=StorageClient("c", is_upgrading=True)), False),
        (Client(its_status=CUT, references=(), its_client=StorageClient("c", problem="x")), False),
        (Client(its_status=CUT, references=(), its_client=StorageClient(None)), False),
    ],
)
def test_without_a_handle_only_a_volume_that_nobody_holds_is_cut_off(client: Client, is_cut: bool) -> None:
    assert is_cut_off(client, "v") is is_cut
