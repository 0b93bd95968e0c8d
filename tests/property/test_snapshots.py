# SPDX-License-Identifier: Apache-2.0
"""Any order of calls about snapshots, with answers that are lost between controller and storage, is as the spec says.

The storage is the embedded manager over a real socket. The oracle is a dictionary of names. A call that fails is made
again, as an orchestrator does; until it succeeds both its states are allowed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from csi_driver.embedded.model import SNAPSHOTS
from csi_driver.errors import Incompatible, SnapshotNotFound, StorageUnavailable
from csi_driver.management.client import ManagementClient
from csi_driver.management.settings import ManagementSettings
from csi_driver.model import CutSnapshot
from tests.contract.snapshot_zones import Kind, Zones, zones_of
from tests.fakes.fault_proxy import Fault, FaultProxy, Seen

NAMES = ("s1", "s2", "s3", "s4", "another form of a name")
SOURCES = ("pvc-1", "pvc-2")
LOST = (Fault.RESET_BEFORE, Fault.RESET_AFTER, Fault.RESET_MID_ANSWER, Fault.TRUNCATED, Fault.ERROR_AFTER)


@dataclass(frozen=True)
class Call:
    """A call; `faults` meet its first requests of snapshots."""

    verb: str
    name: str
    source: str
    size: int
    faults: tuple[Fault, ...]


CALLS = st.lists(
    st.builds(
        Call,
        verb=st.sampled_from(["cut", "cut", "cut", "delete", "get", "list", "walk"]),
        name=st.sampled_from(NAMES),
        source=st.sampled_from(SOURCES),
        size=st.integers(0, 3),
        faults=st.lists(st.sampled_from(LOST), max_size=3).map(tuple),
    ),
    max_size=14,
)


@dataclass
class Lossy:
    """The controller behind a connection that loses answers, and a model of the storage."""

    zones: Zones
    proxy: FaultProxy
    sources: dict[str, str] = field(default_factory=dict)
    known: dict[str, CutSnapshot] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def next_fault(self, request: Seen) -> Fault | None:
        return self.faults.pop(0) if request.path.startswith("/snapshots/") and self.faults else None

    def begin(self) -> None:
        """Delete what the last example left."""
        self.faults.clear()
        for snapshot in self.records():
            self.zones.delete(f"a:{snapshot[0]}:{snapshot[1]}")
        self.known.clear()

    def records(self) -> list[tuple[str, str]]:
        """Return name and uuid of each snapshot, read beside the connection."""
        return [(each.name, each.uuid) for each in self.zones.storages["a"].server.store.all(SNAPSHOTS)]

    def run(self, call: Call) -> None:
        self.faults = list(call.faults)
        act = getattr(self, call.verb)
        for _ in range(len(call.faults) + 1):
            with contextlib.suppress(StorageUnavailable):
                act(call)
                break
            event("a call was lost")
        else:
            pytest.fail(f"{call} fails without a fault")
        self.faults.clear()
        self.compare()

    def compare(self) -> None:
        """Nothing is left or missing: each name of the model is one snapshot."""
        assert sorted(f"a:{name}:{uuid}" for name, uuid in self.records()) == self.ids()

    def ids(self) -> list[str]:
        return sorted(cut.snapshot_id for cut in self.known.values())

    def cut(self, call: Call) -> None:
        source, known = self.sources[call.source], self.known.get(call.name)
        if known is not None and known.source_volume_id != source:
            with pytest.raises(Incompatible):
                self.zones.cut(call.name, source)
            return
        snapshot = self.zones.cut(call.name, source)
        assert known in (None, snapshot)
        assert snapshot.snapshot_id not in {cut.snapshot_id for name, cut in self.known.items() if name != call.name}
        self.known[call.name] = snapshot

    def delete(self, call: Call) -> None:
        known = self.known.get(call.name)
        if known is None:
            return
        self.zones.delete(known.snapshot_id)
        del self.known[call.name]
        with pytest.raises(SnapshotNotFound):
            self.zones.get(known.snapshot_id)

    def get(self, call: Call) -> None:
        if call.name in self.known:
            assert self.zones.get(self.known[call.name].snapshot_id) == self.known[call.name]

    def list(self, call: Call) -> None:
        source = self.sources[call.source]
        mine = sorted(cut.snapshot_id for cut in self.known.values() if cut.source_volume_id == source)
        assert sorted(self.zones.listed(call.size)) == self.ids()
        assert sorted(self.zones.listed(call.size, source_volume_id=source)) == mine

    def walk(self, call: Call) -> None:
        """List in pages of one, and delete one snapshot and cut another after the first page."""
        before = {cut.snapshot_id for cut in self.known.values()}
        found, token = self.zones.page(1)
        faults, self.faults = self.faults, []
        self.delete(call)
        self.cut(Call("cut", "cut while a list is read", call.source, 0, ()))
        self.faults = faults
        while token:
            page, token = self.zones.page(1, token)
            found += page
            assert len(found) < 100, "the pages do not end"
        seen = [cut.snapshot_id for cut in found]
        assert len(seen) == len(set(seen))
        assert before & set(self.ids()) <= set(seen) <= before | set(self.ids())


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lossy]:
    with zones_of(tmp_path_factory.mktemp("snapshots"), a=Kind.REFLINKS) as zones:
        storage = zones.storages["a"]
        proxy = FaultProxy(lambda request: None, hang_s=1)
        proxy.upstream = storage.server.address
        client = ManagementClient(
            ManagementSettings((proxy.url,), storage.settings.user, password_file=storage.server.password.path)
        )
        zones.managements["a"] = client
        zones.restart_controller()
        world = Lossy(zones, proxy)
        proxy.choose = world.next_fault
        world.sources |= {name: zones.volume(name).volume_id for name in SOURCES}
        yield world
        client.close()
        proxy.stop()


def test_lost_answers_leave_one_snapshot_for_each_name(lossy: Lossy) -> None:
    @settings(max_examples=60, deadline=None)
    @given(CALLS)
    def hold(calls: list[Call]) -> None:
        lossy.begin()
        for call in calls:
            lossy.run(call)

    hold()
