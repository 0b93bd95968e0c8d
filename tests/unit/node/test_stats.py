# SPDX-License-Identifier: Apache-2.0
"""NodeGetVolumeStats: correct, and in time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from csi_driver.deadline import Deadline
from csi_driver.errors import NotFound, StorageUnavailable
from csi_driver.model import Usage
from csi_driver.node_settings import NodeSettings
from csi_driver.thread_pool import Job
from tests.fakes.disks import MIB
from tests.fakes.node import BLOCK, NAME, OTHER_TARGET, OTHER_UUID, STAGING, TARGET, UUID, VOLUME_ID, FakeNode

NO_PATIENCE = NodeSettings(node_name="n", state_directory=Path("/nowhere"), statistics_timeout_s=0.02)
PATIENCE = NodeSettings(node_name="n", state_directory=Path("/nowhere"), statistics_timeout_s=60)


@pytest.fixture
def published(node: FakeNode) -> FakeNode:
    node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    return node


def write_off(node: FakeNode) -> Job[Any]:
    asked = node.use.statistics
    return node.write_off(asked.watchdog, lambda limit: asked.usage(VOLUME_ID, str(TARGET), "", deadline=limit))


@pytest.fixture
def hanging(request: pytest.FixtureRequest) -> Iterator[FakeNode]:
    """A published volume with a hanging filesystem, which responds at the end of the test."""
    node = FakeNode(settings=getattr(request, "param", NO_PATIENCE))
    node.host.attach(NAME, UUID)
    node.stage()
    node.publish()
    node.publish(OTHER_TARGET)
    node.host.answers.clear()
    yield node
    node.host.answers.set()


def test_the_use_of_a_filesystem_is_what_it_counts(published: FakeNode) -> None:
    published.host.write_file(TARGET, "a", b"x" * 1000)
    assert published.usage() == Usage(64 * MIB, 1000, 64 * MIB - 1000, 1000, 1, 999)


@pytest.mark.parametrize("path", [TARGET, STAGING])
def test_a_volume_is_found_where_it_is_published_and_where_it_is_staged(published: FakeNode, path: str) -> None:
    assert published.usage(path).total_bytes == 64 * MIB


@pytest.mark.parametrize("read_only", [False, True])
def test_a_block_volume_has_only_its_size(node: FakeNode, read_only: bool) -> None:
    node.host.attach(NAME, UUID)
    node.stage(access=BLOCK)
    node.publish(access=BLOCK, read_only=read_only)
    assert node.usage() == Usage(64 * MIB)


@pytest.mark.parametrize("path", ["some/path", "/var/lib/kubelet/nowhere", "/etc", str(STAGING.parent)])
def test_a_path_without_the_volume_is_not_found(published: FakeNode, path: str) -> None:
    with pytest.raises(NotFound):
        published.usage(path)


@pytest.mark.parametrize("volume_id", ["no/such", "fake-vol", f"z:{NAME}:{OTHER_UUID}"])
def test_another_volume_is_not_found_at_the_path(published: FakeNode, volume_id: str) -> None:
    with pytest.raises(NotFound):
        published.usage(volume_id=volume_id)


def test_a_device_that_is_gone_is_said_to_be_gone(published: FakeNode) -> None:
    published.host.detach(NAME)
    with pytest.raises(StorageUnavailable, match="gone"):
        published.usage()


def test_a_filesystem_that_hangs_is_given_up(hanging: FakeNode) -> None:
    with pytest.raises(StorageUnavailable, match="did not respond in time"):
        hanging.usage()


def test_a_filesystem_that_was_given_up_is_answered_at_once(hanging: FakeNode) -> None:
    write_off(hanging)
    threads = threading.active_count()
    for path in (TARGET, OTHER_TARGET) * 20:
        with pytest.raises(StorageUnavailable, match="still blocked"):
            hanging.usage(path)
    assert threading.active_count() <= threads


@pytest.mark.parametrize("hanging", [PATIENCE], indirect=True)
def test_a_filesystem_that_answers_again_is_asked_again(hanging: FakeNode) -> None:
    answered = write_off(hanging)
    hanging.host.answers.set()
    assert answered.exception(120) is None
    assert hanging.usage().total_bytes == 64 * MIB


def test_a_caller_with_little_time_is_answered_within_it(hanging: FakeNode) -> None:
    late = Deadline.after(0, hanging.clock)
    with pytest.raises(StorageUnavailable):
        hanging.use.statistics.usage(VOLUME_ID, str(TARGET), "", deadline=late)


def test_questions_at_once_for_one_volume_are_all_answered(published: FakeNode) -> None:
    published.publish(OTHER_TARGET)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(published.usage, (TARGET, OTHER_TARGET) * 50))
    assert {answer.total_bytes for answer in answers} == {64 * MIB}
