# SPDX-License-Identifier: Apache-2.0
"""Two controllers over one manager; two nodes on one machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from csi_driver.model import AccessMode
from csi_driver.rpc.client import CallFailed
from tests.client import CsiClient
from tests.integration.rig import MIB, Rig, digest, filesystem, fill, in_parallel, raw_block, running

pytestmark = pytest.mark.root

OTHER_NODE = "other-node"


@pytest.fixture(scope="module")
def two_of_each(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoOfEach]:
    place = tmp_path_factory.mktemp("two")
    other = place / "o"
    other.mkdir()
    with running(place / "d", "--client", f"{OTHER_NODE}={other}") as rig:
        controller, node = second_endpoints(rig, other)
        with controller, node:
            yield TwoOfEach(rig, controller, node)


class TwoOfEach:
    """A rig with a second controller and a second node."""

    def __init__(self, rig: Rig, controller: CsiClient, node: CsiClient) -> None:
        self.rig = rig
        self.controller = controller
        self.node = node
        self.node_id = node.node_info().node_id


def replaced(argv: list[str], values: dict[str, str]) -> list[str]:
    """Return a command line with other values for some of its flags, each of which must be there."""
    changed = list(argv)
    for flag, value in values.items():
        changed[changed.index(flag) + 1] = value
    return changed


def second_endpoints(rig: Rig, other: Path) -> tuple[CsiClient, CsiClient]:
    """Start a second controller and the node of the second client."""
    controller_socket, node_socket = other / "controller.sock", other / "node.sock"
    rig.spawn(
        *replaced(rig.role_argv("controller"), {"--endpoint": f"unix://{controller_socket}"}),
        log=other / "controller.log",
    )
    rig.spawn(
        *replaced(
            rig.role_argv("node"),
            {
                "--endpoint": f"unix://{node_socket}",
                "--node-name": OTHER_NODE,
                "--state-directory": str(other / "node"),
                "--device-directory": str(other / "dev"),
                "--status-directory": str(other / "proc"),
            },
        ),
        log=other / "node.log",
    )
    clients = CsiClient(controller_socket), CsiClient(node_socket)
    for client in clients:
        reason = client.wait_ready(Deadline.after(180))
        assert reason is None, reason
    return clients


def settled(call: Callable[[], object]) -> object:
    """Call until the answer is no longer ABORTED, as a CO does."""
    deadline = Deadline.after(180)
    while True:
        try:
            return call()
        except CallFailed as failure:
            if failure.code != "ABORTED" or deadline.expired():
                raise
        deadline.clock.sleep(0.05)


def test_two_controllers_that_create_the_same_volume_make_one(two_of_each: TwoOfEach) -> None:
    def create(client: CsiClient) -> str:
        return client.create_volume("same-name", required_bytes=1 << 30, capabilities=[filesystem()]).volume_id

    clients = [two_of_each.rig.controller, two_of_each.controller] * 4
    ids = in_parallel([lambda client=client: settled(lambda: create(client)) for client in clients])
    assert len(set(ids)) == 1
    held = [each for each in two_of_each.rig.controller.volumes() if each.volume.volume_id == ids[0]]
    assert len(held) == 1
    deletions = [lambda client=client: settled(lambda: client.delete_volume(str(ids[0]))) for client in clients]
    in_parallel(deletions)


def test_two_controllers_that_attach_the_same_volume_leave_one_device(two_of_each: TwoOfEach) -> None:
    rig = two_of_each.rig
    volume = rig.volume(filesystem())
    clients = [rig.controller, two_of_each.controller] * 2
    in_parallel(
        [
            lambda client=client: settled(lambda: client.attach(volume.id, rig.node_id(), volume.capability))
            for client in clients
        ]
    )
    assert len(list(rig.directory.glob(f"dev/{volume.short}"))) == 1
    in_parallel([lambda client=client: settled(lambda: client.detach(volume.id, rig.node_id())) for client in clients])
    assert not volume.device.exists()
    volume.delete()


def test_an_expansion_through_one_controller_shows_through_the_other(two_of_each: TwoOfEach) -> None:
    volume = two_of_each.rig.volume(filesystem())
    volume.expand(2 << 30)
    assert two_of_each.controller.get_volume(volume.id).volume.capacity_bytes >= 2 << 30
    volume.delete()


def test_a_volume_for_one_node_is_refused_on_another_naming_the_holder(two_of_each: TwoOfEach) -> None:
    rig = two_of_each.rig
    volume = rig.volume(filesystem())
    volume.attach()
    with pytest.raises(CallFailed) as failure:
        two_of_each.controller.attach(volume.id, two_of_each.node_id, volume.capability)
    assert failure.value.code == "FAILED_PRECONDITION"
    assert any(name in failure.value.message for name in (rig.node_id(), rig.directory.name, _host_name()))
    volume.detach()
    volume.delete()


def test_a_volume_moves_to_another_node_with_its_data(two_of_each: TwoOfEach) -> None:
    rig = two_of_each.rig
    volume = rig.volume(filesystem())
    wanted = fill(volume.up() / "data", MIB)
    volume.down()
    context = two_of_each.controller.attach(volume.id, two_of_each.node_id, volume.capability)
    staging, target = volume.other_target("s2"), volume.other_target("t2")
    staging.mkdir()
    two_of_each.node.stage(volume.id, staging, volume.capability, publish_context=context)
    two_of_each.node.publish(volume.id, staging, target, volume.capability, publish_context=context)
    assert digest(target / "data", MIB) == wanted
    two_of_each.node.unpublish(volume.id, target)
    two_of_each.node.unstage(volume.id, staging)
    two_of_each.controller.detach(volume.id, two_of_each.node_id)
    volume.delete()


def test_a_read_only_volume_is_published_on_both_nodes(two_of_each: TwoOfEach) -> None:
    rig = two_of_each.rig
    volume = rig.volume(filesystem())
    wanted = fill(volume.up() / "data", MIB)
    volume.down()
    volume.capability = filesystem("ext4", AccessMode.MULTI_NODE_READER_ONLY)
    volume.up()
    context = two_of_each.controller.attach(volume.id, two_of_each.node_id, volume.capability)
    staging, target = volume.other_target("s2"), volume.other_target("t2")
    staging.mkdir()
    two_of_each.node.stage(volume.id, staging, volume.capability, publish_context=context)
    two_of_each.node.publish(volume.id, staging, target, volume.capability, publish_context=context)
    assert digest(target / "data", MIB) == digest(volume.target / "data", MIB) == wanted
    held = rig.controller.get_volume(volume.id).published_node_ids
    assert set(held) == {rig.node_id(), two_of_each.node_id}
    two_of_each.node.unpublish(volume.id, target)
    two_of_each.node.unstage(volume.id, staging)
    two_of_each.controller.detach(volume.id, two_of_each.node_id)
    volume.end()


def test_a_raw_device_for_several_writers_is_written_from_both_nodes(two_of_each: TwoOfEach) -> None:
    rig = two_of_each.rig
    volume = rig.volume(raw_block(AccessMode.MULTI_NODE_MULTI_WRITER))
    volume.up()
    context = two_of_each.controller.attach(volume.id, two_of_each.node_id, volume.capability)
    staging, target = volume.other_target("s2"), volume.other_target("t2")
    staging.mkdir()
    two_of_each.node.stage(volume.id, staging, volume.capability, publish_context=context)
    two_of_each.node.publish(volume.id, staging, target, volume.capability, publish_context=context)
    wanted = fill(target, MIB)
    volume.unpublish()
    volume.publish()
    assert digest(volume.target, MIB) == wanted
    two_of_each.node.unpublish(volume.id, target)
    two_of_each.node.unstage(volume.id, staging)
    two_of_each.controller.detach(volume.id, two_of_each.node_id)
    with contextlib.suppress(FileNotFoundError):
        staging.rmdir()
    volume.end()


def _host_name() -> str:
    import socket

    return socket.gethostname()
