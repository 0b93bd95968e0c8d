# SPDX-License-Identifier: Apache-2.0
"""What a call of the node reads, by the files that it opens: no cost grows with other volumes or mounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from csi_driver.deadline import Deadline
from tests.audit import opened
from tests.contract.host_machine import HostMachine, Volume, host_machine
from tests.integration.real_node import RealNode, volume_id

pytestmark = pytest.mark.root

Calls = dict[str, Callable[[], object]]


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[HostMachine]:
    with host_machine(tmp_path) as made:
        (made.status_root / "status.json").parent.mkdir(exist_ok=True)
        (made.status_root / "status.json").write_text('{"main": {"uuid": "1f0e8a52-0000-4000-8000-000000000001"}}')
        yield made


@pytest.fixture
def volume(machine: HostMachine) -> Volume:
    return machine.volume()


@pytest.fixture
def calls(machine: HostMachine, volume: Volume) -> Calls:
    """Give the calls of a volume's life in order, after one of another volume (checks of the first call)."""
    node = RealNode(machine)
    other = machine.volume("csi-other")
    for each in (other, volume):
        node.staging(each).mkdir()
    node.stage(other)
    usage, target = node.use.statistics.usage, str(node.root / "pod-1")
    return {
        "stage": lambda: node.stage(volume),
        "publish": lambda: node.publish(volume),
        "publish again": lambda: node.publish(volume),
        "stage again": lambda: node.stage(volume),
        "statistics": lambda: usage(volume_id(volume), target, "", deadline=Deadline.after(60)),
        "unpublish": lambda: node.unpublish(volume),
        "unstage": lambda: node.unstage(volume),
        "stage what has a filesystem": lambda: node.stage(volume),
    }


def test_no_call_of_a_volume_reads_the_table_of_all_mounts(calls: Calls) -> None:
    for name, call in calls.items():
        with opened() as paths:
            call()
        assert not [path for path in paths if path.endswith("mountinfo")], name


def test_no_call_of_a_volume_lists_a_directory_of_all_volumes(calls: Calls) -> None:
    for name, call in calls.items():
        with opened() as paths:
            call()
        assert not [path for path in paths if path.startswith("(list)")], name


def test_what_a_call_of_a_volume_opens(calls: Calls, volume: Volume, machine: HostMachine) -> None:
    """Opens of the device by its path and reads of its status: each may hang, each is work for the client."""
    found = {}
    for name, call in calls.items():
        with opened() as paths:
            call()
        node, status = str(machine.device_root / volume.name), str(machine.status_root / "volumes" / volume.name)
        found[name] = (paths.count(node), paths.count(f"{status}/status.json"))
    assert found == {
        "stage": (5, 6),
        "publish": (2, 2),
        "publish again": (4, 4),
        "stage again": (5, 6),
        "statistics": (2, 2),
        "unpublish": (2, 2),
        "unstage": (4, 4),
        "stage what has a filesystem": (4, 4),
    }
