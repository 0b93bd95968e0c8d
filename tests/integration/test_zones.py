# SPDX-License-Identifier: Apache-2.0
"""Two storage clusters behind controllers of their own process: zones over real sockets, with kills and outages.

The storage managers run here, with model loop devices, so that nothing needs root; the controllers are the program.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.model import DEFAULT_TOPOLOGY_KEY
from csi_driver.rpc.client import CallFailed
from csi_driver.rpc.pb import csi_pb2 as pb
from csi_driver.storage_model import VolumeSummary
from tests.client import CsiClient
from tests.contract.two_managements import Storage
from tests.integration.rig import PROGRAM, REPOSITORY, wait_for

GB = 1_000_000_000


class Clusters:
    """Zones `a` and `b`, the file that describes them, and controllers over it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "clusters.yaml"
        self.zones: dict[str, Storage] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.clients: dict[str, CsiClient] = {}
        for zone in ("a", "b"):
            (directory / zone).mkdir()
            self.zones[zone] = Storage.start(directory / zone)
        self.describe("a", "b")

    def describe(self, *zones: str) -> None:
        text = "zones:\n"
        for zone in zones:
            storage = self.zones[zone]
            text += f"  {zone}: {{servers: ['{storage.server.url}'], user: {storage.settings.user},"
            text += f" passwordFile: '{storage.server.password.path}'}}\n"
        self.file.write_text(text)

    def controller(self, name: str, *flags: str) -> CsiClient:
        """Start a controller and wait until it is ready."""
        socket = self.directory / f"{name}.sock"
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*PROGRAM, "controller", "--endpoint", str(socket), "--clusters-file", str(self.file), *flags],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            )  # fmt: skip
        client = self.clients[name] = CsiClient(socket, timeout_s=120)
        reason = client.wait_ready(Deadline.after(60))
        assert reason is None, self.log(name)
        return client

    def node(self, name: str, *flags: str) -> CsiClient:
        """Start a node, which may find that it cannot work, and wait until it serves."""
        socket = self.directory / f"{name}.sock"
        own = ["--device-directory", str(self.directory / "dev"), "--status-directory", str(self.directory / "proc")]
        argv = [*PROGRAM, "node", "--endpoint", str(socket), "--node-name", name, *own, *flags]
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*argv, "--state-directory", str(self.directory / "state"), "--path-root", str(self.directory)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY,
            )  # fmt: skip
        client = self.clients[name] = CsiClient(socket, timeout_s=120)
        wait_for(socket.exists, "the node to serve")
        return client

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(30)

    def volumes(self, zone: str) -> list[VolumeSummary]:
        with contextlib.closing(self.zones[zone].connect()) as management:
            return list(management.volumes(after="", limit=0, deadline=Deadline.after(20)))

    def names(self) -> list[str]:
        present = (volume for zone in self.zones for volume in self.volumes(zone))
        return sorted(volume.name for volume in present if not volume.is_being_deleted)

    def stop(self, zone: str) -> None:
        """End the storage manager of a zone for good."""
        self.zones.pop(zone).server.stop()

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        for process in self.processes.values():
            process.kill()
            process.wait(30)
        for storage in self.zones.values():
            storage.server.stop()


@pytest.fixture
def clusters(tmp_path: Path) -> Iterator[Clusters]:
    running = Clusters(tmp_path)
    try:
        yield running
    finally:
        running.close()


def segments(zones: Sequence[str]) -> list[Mapping[str, str]]:
    return [{DEFAULT_TOPOLOGY_KEY: zone} for zone in zones]


def create(client: CsiClient, name: str, *zones: str) -> str:
    """Create a volume that prefers these zones in their order; return its handle."""
    request = pb.CreateVolumeRequest(name=name, capacity_range=pb.CapacityRange(required_bytes=GB))
    capability = request.volume_capabilities.add()
    capability.access_mode.mode = pb.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
    capability.mount.fs_type = "ext4"
    for wanted in segments(zones):
        request.accessibility_requirements.requisite.add().segments.update(wanted)
        request.accessibility_requirements.preferred.add().segments.update(wanted)
    return client.call(client.controller.CreateVolume, request).volume.volume_id


def refusal(client: CsiClient, name: str, *zones: str) -> CallFailed:
    with pytest.raises(CallFailed) as refused:
        create(client, name, *zones)
    return refused.value


def free_bytes(client: CsiClient, zone: str) -> int:
    request = pb.GetCapacityRequest(accessible_topology=pb.Topology(segments={DEFAULT_TOPOLOGY_KEY: zone}))
    return client.call(client.controller.GetCapacity, request).available_capacity


def test_zones_are_used_listed_measured_and_followed(clusters: Clusters) -> None:
    client = clusters.controller("one")
    handles = [create(client, "v1", "b", "a"), create(client, "v2", "a")]
    assert [handle.partition(":")[0] for handle in handles] == ["b", "a"]
    assert create(client, "v1", "a", "b") == handles[0]
    assert sorted(listed.volume.volume_id for listed in client.volumes()) == sorted(handles)
    assert 0 < free_bytes(client, "a") == free_bytes(client, "b")

    clusters.describe("b")
    wait_for(lambda: free_bytes(client, "a") == 0, "the zone to be gone")
    with pytest.raises(CallFailed) as refused:
        client.delete_volume(handles[1])
    assert refused.value.code == "FAILED_PRECONDITION"
    assert len(clusters.volumes("a")) == 1
    clusters.file.write_text("zones: {b: {colour: red}}")
    client.delete_volume(handles[0])
    clusters.describe("a", "b")
    wait_for(lambda: free_bytes(client, "a") > 0, "the zone to be back")
    client.delete_volume(handles[1])
    assert clusters.names() == []


def test_a_dead_zone_leaves_the_other_one_usable(clusters: Clusters) -> None:
    client = clusters.controller("one")
    handle = create(client, "v1", "a")
    clusters.stop("b")
    assert client.get_volume(handle).volume.volume_id == handle
    assert create(client, "v2", "a").startswith("a:")
    assert refusal(client, "v3", "a", "b").code == "UNAVAILABLE"
    assert (free_bytes(client, "b"), free_bytes(client, "a") > 0) == (0, True)
    with pytest.raises(CallFailed) as refused:
        list(client.volumes())
    assert refused.value.code == "UNAVAILABLE"
    skipping = clusters.controller("skipping", "--allow-zone-skip")
    assert create(skipping, "v3", "b", "a").startswith("a:")
    assert "zone b is skipped although it may have volume" in clusters.log("skipping")


def test_a_controller_that_is_killed_leaves_no_second_volume_behind(clusters: Clusters) -> None:
    first = clusters.controller("first")
    clusters.zones["a"].hold("initialize")
    with ThreadPoolExecutor(1) as pool:
        cut_off = pool.submit(refusal, first, "v1", "a", "b")
        wait_for(lambda: len(clusters.volumes("a")) == 1, "the volume to be made")
        clusters.kill("first")
        cut_off.result(120)
    clusters.zones["a"].release("initialize")
    second = clusters.controller("second")
    assert create(second, "v1", "b", "a").startswith("a:")
    clusters.stop("a")
    assert refusal(second, "v1", "b", "a").code == "UNAVAILABLE"
    assert clusters.volumes("b") == []


def test_two_controllers_with_different_zones_never_return_two_volumes_of_a_name(clusters: Clusters) -> None:
    clients = clusters.controller("one"), clusters.controller("other")
    names = [f"v{number}" for number in range(8)]

    def returned_by_both(name: str) -> set[str]:
        """Call both at the same moment; return the handles in their answers."""
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(create, clients[0], name, "a", "b"), pool.submit(create, clients[1], name, "b", "a")]
            errors = [error for call in calls if (error := call.exception(60)) is not None]
        assert all(isinstance(each, CallFailed) and each.code == "FAILED_PRECONDITION" for each in errors), errors
        return {call.result() for call in calls if call.exception() is None}

    with ThreadPoolExecutor(4) as pool:
        returned = list(pool.map(returned_by_both, names))
    present = {f"{zone}:{volume.name}:{volume.uuid}" for zone in clusters.zones for volume in clusters.volumes(zone)}
    assert len({each.split(":")[1] for each in present}) == len(names)
    assert all(len(handles) <= 1 and handles <= present for handles in returned)
    for name, handles in zip(names, returned, strict=True):
        if not handles:  # both were created, and neither may be returned or deleted
            assert refusal(clients[0], name, "a", "b").code == "FAILED_PRECONDITION"


def test_a_node_finds_its_zone_by_its_storage_clients_management(clusters: Clusters) -> None:
    names, configuration = clusters.directory / "names.yaml", clusters.directory / "nvmesh.conf"
    names.write_text("zones: {a: {servers: [m1.east.example]}, b: {servers: [m1.west.example, 10.0.0.9]}}")
    configuration.write_text('MANAGEMENT_PROTOCOL="https"\nMANAGEMENT_SERVERS="m9:4001"\n')
    node = clusters.node("node-1", f"--clusters-file={names}", f"--client-configuration={configuration}")
    with pytest.raises(CallFailed) as refused:
        node.node_info()
    assert refused.value.code == "FAILED_PRECONDITION"
    assert "expected one of a, b" in refused.value.message
    configuration.write_text('MANAGEMENT_SERVERS="m9:4001,10.0.0.9:4001"')
    assert node.node_info().accessible_topology.segments == {DEFAULT_TOPOLOGY_KEY: "b"}


def test_a_node_of_the_only_cluster_goes_on_saying_what_old_volumes_demand(clusters: Clusters) -> None:
    node = clusters.node("node-1", f"--client-configuration={clusters.directory / 'absent'}")
    assert node.node_info().accessible_topology.segments == {"nvmesh-csi.excelero.com/zone": "single-zone-cluster"}
