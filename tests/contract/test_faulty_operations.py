# SPDX-License-Identifier: Apache-2.0
"""Thousands of operations of two controllers while servers and the network between them fail in every way.

Whatever was acknowledged is so, and nothing else: no volume lost, none doubled, none deleted or given away while it is
attached. NVMESH_CSI_FAULTY_OPERATIONS sets how many operations are done, NVMESH_CSI_SEED which ones and what goes
wrong; how the threads meet is the machine's.
"""

from __future__ import annotations

import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.contract.faulty_world import Weather, Worker, World, faulty_world

OPERATIONS = int(os.environ.get("NVMESH_CSI_FAULTY_OPERATIONS", "300"))
SEED = int(os.environ.get("NVMESH_CSI_SEED", "0")) or secrets.randbits(31)
WORKERS = 12
SHARE = 0.12


def report(world: World, weather: Weather, operations: int) -> str:
    calls, failed = sum(world.calls.values()), sum(world.failures.values())
    requests = sum(sum(proxy.forwarded.values()) for proxy in world.proxies)
    """Say what was done, and for a long run what went wrong meanwhile."""
    faults = {str(fault): count for fault, count in world.drawn.dealt.most_common()}
    summary = (
        f"seed {SEED}: {operations} operations, {calls} calls ({failed} of them failed and were repeated), "
        f"{requests} requests reached the server, {sum(faults.values())} faults, {world.restarts} restarts"
    )
    if operations < 1000:
        return summary
    failures = dict(world.failures.most_common())
    return f"{summary}\nweather: {dict(weather.seen)}\nfaults: {faults}\nfailures: {failures}"


def test_what_was_acknowledged_is_so_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nfaulty operations: NVMESH_CSI_SEED={SEED}")
    with faulty_world(tmp_path, SEED, SHARE) as world:
        workers = [Worker(world, SEED, number) for number in range(WORKERS)]
        weather = Weather(world, SEED, every=600)
        weather.start()
        try:
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(lambda worker: worker.run(-(-OPERATIONS // WORKERS)), workers))
        finally:
            weather.stop()
            with capsys.disabled():
                print(report(world, weather, sum(worker.operations for worker in workers)))
        assert world.wrongly_deleted == []
        kept = [volume for worker in workers for volume in worker.kept if volume.handle]
        stored = world.volumes()
        assert {volume.uuid for volume in kept} == set(stored)
        assert {volume.uuid: volume.size_bytes for volume in kept} == {uuid: row.bytes for uuid, row in stored.items()}
        assert {volume.uuid: {volume.node} - {""} for volume in kept} == {
            volume.uuid: world.nodes_of(volume.uuid) for volume in kept
        }
        assert len(set(world.drawn.dealt)) > 10  # it was no calm day
