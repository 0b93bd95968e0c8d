# SPDX-License-Identifier: Apache-2.0
"""The path keeper: connects lost paths of NVMe/TCP volumes again, and notices that a volume was taken over.

The kernel reconnects a path by itself while its controller exists. The keeper acts when a controller is gone: it was
refused, or the storage machine was away for longer than the time limit of I/O. A target that refuses this node has
given the volume up for another node: the volume is marked, I/O that waits for a path is failed, and nothing is
connected again, so that nothing is flushed.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from concurrent.futures import wait
from dataclasses import dataclass, field

from csi_driver.errors import DriverError
from csi_driver.host.connectors.nvme import PROBE_S, NvmeVolumes, Refused
from csi_driver.host.connectors.nvme_proof import why_no_io
from csi_driver.host.connectors.nvme_records import Connection
from csi_driver.host.nvme_host import LIVE
from csi_driver.host.nvme_owners import Owners
from csi_driver.host_model import NvmeOrphan
from csi_driver.nvme_model import NvmeExport, NvmeStates, host_nqn
from csi_driver.thread_pool import Job

_LOG = logging.getLogger(__name__)
_REQUEUED = "io_requeue_no_usable_path_count"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 8.0
_PROBES_AT_ONCE = 128
"""Each takes a descriptor, and the usual limit of a process is 1024."""


@dataclass(slots=True)
class PathKeeper:
    """Keeps the paths of `volumes`. `keep` is called once a second by one thread."""

    volumes: NvmeVolumes
    round_s: float = 2.0
    """So long a round waits for the connects that it started; the next round finds those that still run."""
    owners: Owners | None = None
    reconnects: int = field(default=0, init=False)
    _settled: dict[str, tuple[Connection, frozenset[tuple[str, int]]]] = field(default_factory=dict, init=False)
    _pauses: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict, init=False)
    _running: dict[Job[None], tuple[Connection, str, float]] = field(default_factory=dict, init=False)
    """The connects that have no result yet, and when they began."""
    _marked: frozenset[tuple[str, int]] = field(default=frozenset(), init=False)
    _swept: frozenset[tuple[str, int]] | None = field(default=None, init=False)

    def keep(self) -> None:
        """Look at every path; without a change that reads one directory, a device node, and one file for each path."""
        self._harvest()
        records = self.volumes.records.all()
        entries = self.volumes.sysfs.entries()
        missing: list[tuple[Connection, str]] = []
        for record in records.values():
            if not self._is_settled(record, entries):
                missing += [(record, path) for path in self._look_at(record, entries)]
        self._marked &= entries
        self._settled = {name: each for name, each in self._settled.items() if name in records}
        self._pauses = {key: each for key, each in self._pauses.items() if key[0] in records}
        missing.sort(key=lambda each: self._pauses[each[0].name, each[1]])  # those that are due for longest first
        if self.owners is not None and entries != self._swept:
            self._swept = entries
            self.owners.sweep(lambda name: bool(self.volumes.sysfs.nqn(name)), {name for name, _ in entries})
        if missing:
            self._connect(missing[:_PROBES_AT_ONCE])

    def _is_settled(self, record: Connection, entries: frozenset[tuple[str, int]]) -> bool:
        known, controllers = self._settled.get(record.name, (None, frozenset()))
        return (
            known is record
            and controllers <= entries
            and self.volumes.has_node(record.name)
            and all(self.volumes.sysfs.state(name) == LIVE for name, _ in controllers)
        )

    def _look_at(self, record: Connection, entries: frozenset[tuple[str, int]]) -> list[str]:
        """Return the paths to connect now; notes the volume as settled when nothing is missing."""
        self._settled.pop(record.name, None)
        if record.is_ending:
            return []  # the repeated NodeUnstageVolume goes on
        if record.is_refused:
            self.volumes.start_deletes(record.export.nqn)
            return []
        subsystem = self.volumes.sysfs.find(record.export.nqn)
        controllers = subsystem.lasting if subsystem is not None else []
        live = {each.path for each in controllers if each.state == LIVE and each.path in record.export.paths}
        if live and any(each.path not in record.export.paths for each in controllers):
            self.volumes.start_deletes(record.export.nqn, keep=record.export.paths)
        names = {each.name for each in controllers}
        shown = frozenset(entry for entry in entries if entry[0] in names)
        self._mark(shown - self._marked)
        is_whole = live == set(record.export.paths) and len(shown) == len(controllers) == len(live)
        if self._has_node(record) and is_whole:
            self._settled[record.name] = record, shown
            self._pauses = {key: each for key, each in self._pauses.items() if key[0] != record.name}
        return self._due(record, {each.path for each in controllers})

    def _mark(self, controllers: frozenset[tuple[str, int]]) -> None:
        if self.owners is not None:
            for name, _ in controllers:
                self.owners.mark(name)
            self._marked |= controllers

    def _has_node(self, record: Connection) -> bool:
        try:
            return self.volumes.place_node(record)
        except DriverError as failure:
            _LOG.error("the device node of volume %s is not made: %s", record.name, failure)
            return False

    def _due(self, record: Connection, present: set[str]) -> list[str]:
        """Return the missing paths to connect; not at the first look, as a stage may just connect them."""
        now_s = self.volumes.clock.monotonic()
        running = {(known.name, path) for known, path, _ in self._running.values()}
        keys = [(record.name, path) for path in record.export.paths if path not in present]
        keys = [key for key in keys if key not in running]
        due = [path for name, path in keys if self._pauses.get((name, path), (math.inf,))[0] <= now_s]
        for key in keys:
            self._pauses.setdefault(key, (now_s, _FIRST_PAUSE_S))
        return due

    def _connect(self, missing: list[tuple[Connection, str]]) -> None:
        answered = self.volumes.fabrics.probe({path for _, path in missing}, PROBE_S, PROBE_S)
        began_s = self.volumes.clock.monotonic()
        for record, path in missing:
            if path in answered:
                self._running[self.volumes.start_connect(record, path)] = record, path, began_s
            else:
                self._failed(record, path)
        wait(self._running, self.round_s)
        self._harvest()

    def _harvest(self) -> None:
        for job in [job for job in self._running if job.done()]:
            record, path, began_s = self._running.pop(job)
            if not job.cancelled():
                self._finished(record, path, job.exception(), self.volumes.clock.monotonic() - began_s)

    def _finished(self, record: Connection, path: str, failure: BaseException | None, took_s: float) -> None:
        if failure is None:
            self.reconnects += 1
            _LOG.info("volume %s is connected again at %s", record.name, path)
            self._has_node(record)
            return
        self._failed(record, path, took_s)
        _LOG.warning("volume %s: %s", record.name, failure)
        if isinstance(failure, Refused):
            self.volumes.mark_refused(record)

    def _failed(self, record: Connection, path: str, took_s: float = 0.0) -> None:
        """Pause, for at least as long as the failure took: meanwhile the kernel connected nothing else."""
        _, pause_s = self._pauses.get((record.name, path), (0.0, _FIRST_PAUSE_S))
        until_s = self.volumes.clock.monotonic() + max(pause_s, took_s)
        self._pauses[record.name, path] = until_s, min(pause_s * 2, _LONGEST_PAUSE_S)

    def orphans(self) -> tuple[NvmeOrphan, ...]:
        """Return this node's connections to pools of this registry that no record names."""
        sysfs, records = self.volumes.sysfs, self.volumes.records
        nqns = {sysfs.nqn(name): name for name, _ in sysfs.entries()}  # first: a record is older than its connection
        known = {record.export.nqn for record in records.all().values()}
        found: dict[str, NvmeOrphan] = {}
        for nqn in sorted(nqns.keys() - known):
            if NvmeExport(nqn, ()).pool not in records.pools or records.unreadable:
                continue  # a record that cannot be read may name it
            is_own = sysfs.host_nqn(nqns[nqn]) == host_nqn(self.volumes.node_id())
            subsystem = sysfs.find(nqn) if is_own else None
            if subsystem is not None:
                found[nqn] = NvmeOrphan(nqn, subsystem.heads[0].number if subsystem.heads else None)
        return tuple(found.values())

    def states(self) -> NvmeStates:
        volumes, paths, failovers, requeued = Counter[str](), Counter[str](), 0, 0
        sysfs = self.volumes.sysfs
        for record in self.volumes.records.all().values():
            subsystem = self.volumes.sysfs.find(record.export.nqn)
            why_not = why_no_io(record, subsystem)
            volumes["fenced" if record.is_refused else "no_path" if why_not else "ready"] += 1
            controllers = subsystem.controllers if subsystem is not None else ()
            paths["missing"] += len(set(record.export.paths) - {each.path for each in controllers})
            for controller in controllers:
                paths[controller.state] += 1
                failovers += sysfs.path_count(controller.name, "multipath_failover_count")
            if subsystem is not None:
                counts = (sysfs.of_head(subsystem.name, each.name, _REQUEUED) for each in subsystem.heads)
                requeued += sum(int(text) for text in counts if text.isdigit())
        return NvmeStates(volumes, paths, len(self.orphans()), self.reconnects, failovers, requeued)
