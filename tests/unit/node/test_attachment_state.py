# SPDX-License-Identifier: Apache-2.0
"""The attachment state of a volume, as the files of the storage client show it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from csi_driver.host_model import Device, DeviceNumber, StorageClient, VolumeStatus
from csi_driver.model import VolumeHandle
from csi_driver.node.mount_owner import AttachmentState, attachment_state, is_cut_off
from csi_driver.node.ports import Devices

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"
HANDLE = VolumeHandle("v", "z", UUID, "team-a")
NODE = Device("v", Path("/dev/nvmesh/v"), DeviceNumber(252, 1), 1 << 30, False, UUID)
WORKS, CUT = VolumeStatus("v", UUID, io_enabled=True), VolumeStatus("v", UUID, io_enabled=False)
SILENT = VolumeStatus("v", UUID)
PREEMPTED = VolumeStatus("v", UUID, io_enabled=False, preempted=True)


@dataclass
class Client:
    """A storage client with the status of a test."""

    its_status: VolumeStatus | None = WORKS
    references: tuple[str, ...] | None = ("team-a",)
    node: Device | None = NODE
    its_client: StorageClient = field(default_factory=lambda: StorageClient("c", is_expected=True))
    its_connection: VolumeStatus | None = None

    def connection(self, name: str) -> VolumeStatus | None:
        return self.its_connection

    def client(self) -> StorageClient:
        return self.its_client

    def status(self, name: str) -> VolumeStatus | None:
        return self.its_status

    def reference_ids(self, name: str) -> tuple[str, ...] | None:
        return self.references

    def find(self, name: str, uuid: str | None = None) -> Device | None:
        return self.node


@pytest.mark.parametrize(
    ("client", "state"),
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
        # An unknown version of the client does not report missing I/O.
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
def test_the_state_follows_from_the_files_of_the_client(client: Client, state: AttachmentState) -> None:
    assert attachment_state(cast(Devices, client), HANDLE, UUID) is state


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
def test_without_a_running_client_the_state_is_not_known(state: StorageClient, status: VolumeStatus | None) -> None:
    client = Client(status, None if status is None else (), None, state)
    assert attachment_state(cast(Devices, client), HANDLE, UUID) is AttachmentState.UNKNOWN


@pytest.mark.parametrize("uuid", [UUID, UUID.upper()])
def test_a_handle_without_reference_is_attached_under_the_volumes_uuid(uuid: str) -> None:
    plain = VolumeHandle("v", "z")
    assert attachment_state(cast(Devices, Client(references=(UUID,))), plain, uuid) is AttachmentState.ATTACHED
    fenced = cast(Devices, Client(its_status=CUT, references=("team-a",)))
    assert attachment_state(fenced, plain, uuid) is AttachmentState.FENCED


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
def test_by_name_only_a_preempted_volume_or_one_without_references_is_cut_off(client: Client, is_cut: bool) -> None:
    assert is_cut_off(cast(Devices, client), "v") is is_cut


@pytest.mark.parametrize(
    ("connection", "state"),
    [
        (WORKS, AttachmentState.ATTACHED),
        # Without a path I/O waits, and the storage machine may be back.
        (CUT, AttachmentState.ATTACHED),
        (PREEMPTED, AttachmentState.FENCED),
        (replace(PREEMPTED, uuid=OTHER), AttachmentState.WITHDRAWN),
    ],
)
def test_the_state_of_a_connected_volume_needs_no_client(connection: VolumeStatus, state: AttachmentState) -> None:
    node = Client(its_status=None, references=None, its_client=StorageClient(None), its_connection=connection)
    assert attachment_state(cast(Devices, node), HANDLE, UUID) is state
    assert is_cut_off(cast(Devices, node), "v") is connection.preempted
