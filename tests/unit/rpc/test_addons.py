# SPDX-License-Identifier: Apache-2.0
"""The endpoint of CSI-Addons, called as its sidecar calls, over a node in memory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc
import pytest

from csi_driver.controller.reclaim_space import ReclaimSpace
from csi_driver.deadline import Deadline
from csi_driver.node.addons import NodeAddons
from csi_driver.rpc.addons import AddonsIdentity, controller_services, node_services
from csi_driver.rpc.boundary import Boundary
from csi_driver.rpc.client import CallFailed, CsiClient
from csi_driver.rpc.contract import ADDONS, Rpc
from csi_driver.rpc.identity import IdentityService, is_equipped
from csi_driver.rpc.pb import csi_pb2, encryptionkeyrotation_pb2, identity_pb2, reclaimspace_pb2
from csi_driver.rpc.redaction import STRIPPED, describe
from csi_driver.rpc.server import Server
from csi_driver.settings import EndpointSettings
from tests.addons_client import Sidecar, sidecar
from tests.fakes.node import BLOCK, KUBELET, NAME, UUID, VOLUME_ID, FakeNode
from tests.unit.node.encrypted import ROTATION, Locked
from tests.unit.rpc.fakes import status_of

DRIVER = "nvmesh-csi.example.com"
STAGING = KUBELET / f"plugins/kubernetes.io/csi/{DRIVER}/{hashlib.sha256(VOLUME_ID.encode()).hexdigest()}/globalmount"
MODES = csi_pb2.VolumeCapability.AccessMode


@dataclass
class Served:
    node: FakeNode
    boundary: Boundary
    sidecar: Sidecar
    sockets: tuple[Path, Path]


@contextmanager
def serving(directory: Path, *, problem: str = "", mode: int | None = None) -> Iterator[Served]:
    node, boundary = FakeNode(), Boundary()
    node.host.make_tree(STAGING)
    identity = IdentityService(DRIVER, lambda: "1.2.3", lambda: is_equipped(lambda: [problem] if problem else []))
    sockets = directory / "csi.sock", directory / "addons.sock"
    settings = EndpointSettings(sockets[0], csi_addons_socket=sockets[1])
    server = Server(settings, boundary, (identity,), node_services(identity, NodeAddons(node.use.expand)))
    server.start()
    modes = {} if mode is None else {"mode": mode}
    try:
        with sidecar(sockets[1], kubelet=KUBELET, **modes) as client:
            yield Served(node, boundary, client, sockets)
    finally:
        server.drain()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as made:
        yield made


def test_a_node_tells_its_name_and_what_it_does(served: Served) -> None:
    assert served.sidecar.start() == (DRIVER, {"NODE_SERVICE", "ONLINE", "ENCRYPTIONKEYROTATION"})


def test_a_node_that_lacks_tools_is_not_ready(tmp_path: Path) -> None:
    with serving(tmp_path, problem="mkfs.ext4 is missing") as served, pytest.raises(CallFailed) as failed:
        served.sidecar.start()
    assert (failed.value.code, failed.value.message) == ("FAILED_PRECONDITION", "mkfs.ext4 is missing")


def test_a_staged_filesystem_is_trimmed_by_the_path_that_the_sidecar_knows(served: Served) -> None:
    disk = served.node.host.attach(NAME, UUID)
    served.node.stage(staging=STAGING)
    served.sidecar.trim(DRIVER, VOLUME_ID)
    assert disk.filesystem is not None
    assert disk.filesystem.trims == 1


def test_a_raw_block_volume_answers_unimplemented_which_the_job_takes_for_nothing_to_do(served: Served) -> None:
    served.node.host.attach(NAME, UUID)
    served.node.stage(access=BLOCK)
    with pytest.raises(CallFailed) as failed:
        served.sidecar.trim_block(VOLUME_ID, "pvc-1")
    assert failed.value.code == "UNIMPLEMENTED"


def test_a_passphrase_is_changed_with_the_fields_that_the_sidecar_sends(served: Served) -> None:
    locked = Locked(served.node)
    locked.up()
    served.sidecar.rotate(VOLUME_ID, {"encryption": "luks"}, ROTATION)
    assert locked.luks.keys == ["new passphrase"]


@pytest.mark.parametrize("mode", [MODES.UNKNOWN, *(mode for name, mode in MODES.Mode.items() if "MULTI_NODE" in name)])
def test_a_header_is_written_only_where_no_other_node_may_write_it(tmp_path: Path, mode: int) -> None:
    with serving(tmp_path, mode=mode) as served:
        locked = Locked(served.node)
        locked.up()
        with pytest.raises(CallFailed, match="shared") as failed:
            served.sidecar.rotate(VOLUME_ID, {"encryption": "luks"}, ROTATION)
    assert failed.value.code == "FAILED_PRECONDITION"
    assert locked.luks.keys == ["correct horse"]


def test_a_call_of_csi_for_the_volume_locks_those_of_the_addons_out(served: Served) -> None:
    with served.boundary.lock_volume(NAME):
        with pytest.raises(CallFailed) as failed:
            served.sidecar.trim(DRIVER, VOLUME_ID)
        assert failed.value.code == "ABORTED"
        with pytest.raises(CallFailed) as failed:
            served.sidecar.rotate(VOLUME_ID, {"encryption": "luks"}, ROTATION)
        assert failed.value.code == "ABORTED"


def test_an_attachment_does_not_wait_for_the_end_of_a_reclaim(tmp_path: Path) -> None:
    boundary, locked = Boundary(), []

    class Reclaim:
        def reclaim(self, volume_id: str, *, deadline: Deadline) -> None:
            with boundary.lock_volume(NAME):  # as ControllerPublishVolume does
                locked.append(volume_id)

    identity = IdentityService(DRIVER, lambda: "1.2.3", lambda: True)
    settings = EndpointSettings(tmp_path / "csi.sock", csi_addons_socket=tmp_path / "addons.sock")
    server = Server(settings, boundary, (identity,), controller_services(identity, cast(ReclaimSpace, Reclaim())))
    server.start()
    try:
        with sidecar(tmp_path / "addons.sock") as client:
            client.sparsify(VOLUME_ID, {})
    finally:
        server.drain()
    assert locked == [VOLUME_ID]


def test_calls_are_counted_with_those_of_csi(served: Served) -> None:
    served.sidecar.start()
    (metric,) = served.boundary.durations.collect()
    assert ("identity.Identity", "Probe") in {
        (sample.labels["service"], sample.labels["method"]) for sample in metric.samples
    }


def test_no_secret_is_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    Locked(served.node).up()
    with caplog.at_level(logging.DEBUG):
        served.sidecar.rotate(VOLUME_ID, {"encryption": "luks"}, ROTATION)
    assert f"secrets={STRIPPED}" in caplog.text
    assert not [word for word in ROTATION.values() if word in caplog.text]


def test_a_given_key_is_a_secret() -> None:
    request = encryptionkeyrotation_pb2.EncryptionKeyRotateRequest(volume_id="a", encryption_key="horse")
    assert describe(request) == f"volume_id='a' encryption_key={STRIPPED}"


def test_each_endpoint_serves_its_own_services_alone(served: Served) -> None:
    csi, addons = served.sockets
    with CsiClient(addons) as client, pytest.raises(CallFailed) as failed:
        client.plugin_name()
    assert failed.value.code == "UNIMPLEMENTED"
    with sidecar(csi) as wrong, pytest.raises(CallFailed) as failed:
        wrong.start()
    assert failed.value.code == "UNIMPLEMENTED"


def test_both_sockets_end_together(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        assert all(path.is_socket() for path in served.sockets)
    assert not any(path.exists() for path in served.sockets)


def test_a_network_fence_is_not_offered(tmp_path: Path) -> None:
    with serving(tmp_path) as served, grpc.insecure_channel(f"unix:{served.sockets[1]}") as channel:
        call = channel.unary_unary(
            "/fence.FenceController/FenceClusterNetwork", request_serializer=bytes, response_deserializer=bytes
        )
        with pytest.raises(grpc.RpcError) as failed:
            call(b"")
    assert status_of(failed.value) is grpc.StatusCode.UNIMPLEMENTED


# --- the rows of the contract -----------------------------------------------------------------------------------

FILES = (identity_pb2.DESCRIPTOR, reclaimspace_pb2.DESCRIPTOR, encryptionkeyrotation_pb2.DESCRIPTOR)


def test_every_method_that_is_described_has_an_entry() -> None:
    described = {
        f"/{service.full_name}/{method.name}"
        for file in FILES
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert set(ADDONS) == described


@pytest.mark.parametrize("rpc", [pytest.param(rpc, id=rpc.method) for rpc in ADDONS.values()])
def test_what_works_on_a_node_takes_the_lock_of_the_volume(rpc: Rpc) -> None:
    assert rpc.locks == (("volume_id",) if rpc.may_hang else ())


def test_what_works_on_devices_may_be_answered_late() -> None:
    assert {rpc.name for rpc in ADDONS.values() if rpc.may_hang} == {"NodeReclaimSpace", "EncryptionKeyRotate"}


def test_the_identity_is_that_of_csi(tmp_path: Path) -> None:
    identity = IdentityService(DRIVER, lambda: "1.2.3", lambda: True)
    answer = AddonsIdentity(identity).GetIdentity(identity_pb2.GetIdentityRequest(), FakeNode().soon())
    assert (answer.name, answer.vendor_version) == (DRIVER, "1.2.3")
