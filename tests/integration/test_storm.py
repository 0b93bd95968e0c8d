# SPDX-License-Identifier: Apache-2.0
"""A boot storm: many volumes are staged and published at once; calls wait their turn and none is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.storm import storm
from tests.client import CsiClient
from tests.integration.rig import Rig, Volume, filesystem, in_parallel, mounts_below, running

pytestmark = pytest.mark.root

VOLUMES = 60


def up(volume: Volume) -> list[Callable[[CsiClient], object]]:
    """Return kubelet's calls for a volume."""
    given = {"publish_context": volume.publish_context, "volume_context": volume.context}
    return [
        lambda client: client.stage(volume.id, volume.staging, volume.capability, **given),
        lambda client: client.publish(volume.id, volume.staging, volume.target, volume.capability, **given),
    ]


def down(volume: Volume) -> list[Callable[[CsiClient], object]]:
    return [
        lambda client: client.unpublish(volume.id, volume.target),
        lambda client: client.unstage(volume.id, volume.staging),
    ]


def test_a_storm_of_volumes_meets_no_error_and_leaves_probe_answered(tmp_path: Path) -> None:
    with running(tmp_path / "d") as rig:
        volumes = [volume for volume in in_parallel([lambda: attached(rig)] * VOLUMES) if isinstance(volume, Volume)]
        probes: list[bool] = []
        ended = threading.Event()

        def probe() -> None:
            while not ended.wait(0.05):
                probes.append(rig.node.is_ready(timeout_s=120))

        prober = threading.Thread(target=probe)
        prober.start()
        try:
            for way, mounts in ((up, 2 * VOLUMES), (down, 0), (up, 2 * VOLUMES), (down, 0)):
                weather = storm(rig.node.socket, [way(volume) for volume in volumes], at_once=VOLUMES)
                assert weather.refusals == {}
                assert weather.calls == 2 * VOLUMES
                assert len(mounts_below(volumes[0].paths)) == mounts
        finally:
            ended.set()
            prober.join()
        assert probes
        assert all(probes)


def attached(rig: Rig) -> Volume:
    volume = rig.volume(filesystem(), label="storm")
    volume.staging.mkdir()
    volume.attach()
    return volume
