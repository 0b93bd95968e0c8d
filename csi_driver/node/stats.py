"""Use of a volume, answered in time whatever hangs (kubelet waits for it with everything else it measures)."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, StorageUnavailable, VolumeNotFound
from csi_driver.model import Usage
from csi_driver.node.expand import known_path
from csi_driver.node.ownership import NamedVolume, Owner, Ownership, named, number_of
from csi_driver.node.ports import Devices, Filesystems, Mounts, Paths
from csi_driver.node.requests import NodeSettings

WORKERS = 8
"""Threads that may wait for a filesystem at once. A thread whose device hangs is lost until the device answers."""


@dataclass(slots=True)
class _Call:
    """One question under way: at most one per volume. `gave_up` once somebody waited for it in vain."""

    path: str
    work: Callable[[], Usage]
    done: threading.Event = field(default_factory=threading.Event)
    answer: Usage | DriverError | None = None
    gave_up: bool = False

    def run(self) -> None:
        try:
            self.answer = self.work()
        except DriverError as error:
            self.answer = error

    def result(self) -> Usage:
        match self.answer:
            case Usage() as usage:
                return usage
            case DriverError() as error:
                raise error
            case None:
                raise RuntimeError(f"the question for the use of {self.path} ended by a bug; see its traceback")


class Statistics:
    """NodeGetVolumeStats."""

    def __init__(
        self,
        *,
        devices: Devices,
        mounts: Mounts,
        filesystems: Filesystems,
        paths: Paths,
        ownership: Ownership,
        settings: NodeSettings,
    ) -> None:
        self._devices = devices
        self._mounts = mounts
        self._filesystems = filesystems
        self._paths = paths
        self._ownership = ownership
        self._timeout_s = settings.statistics_timeout_s
        self._margin_s = settings.answer_margin_s
        self._calls = _Calls()

    def usage(self, volume_id: str, volume_path: str, staging_target_path: str, *, deadline: Deadline) -> Usage:
        """Return the use of the volume at `volume_path`. A block volume has only its size.

        Raises `VolumeNotFound` when the volume is not there, `StorageUnavailable` when its filesystem or device does
        not answer: after the settings' time the first time, at once while that question is still open.
        """
        volume, _ = named(volume_id)
        path = known_path(self._paths, volume, volume_path)

        def ask() -> Usage:
            mounted = self._mounts.at(path)
            if mounted is None or self._ownership.owner_of(mounted, volume) is Owner.OTHER:
                raise VolumeNotFound(volume_id, f"it is not at {path}")
            number = number_of(mounted)
            size = self._devices.size_bytes(number) if number.major else None
            if number.major and not size:
                raise StorageUnavailable(f"the device {number} of volume {volume} at {path} is gone")
            if mounted.node_number is not None and size:
                return Usage(total_bytes=size)
            return self._filesystems.usage(path)

        timeout_s = min(self._timeout_s, max(0.0, deadline.remaining_s() - self._margin_s))
        return self._calls.ask(volume, str(path), ask, timeout_s)


class _Calls:
    """Questions under way, by volume, and the few daemon threads that wait for the answers.

    Daemons: a thread that hangs in the kernel must not keep the program from ending.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, _Call] = {}
        self._waiting: queue.SimpleQueue[tuple[str, _Call]] = queue.SimpleQueue()
        self._threads = 0
        self._idle = 0

    def ask(self, volume: NamedVolume, path: str, work: Callable[[], Usage], timeout_s: float) -> Usage:
        """Run `work` in a thread and return its result; a question for the same path that is open is shared."""
        deadline = Deadline.after(timeout_s)
        while True:
            with self._lock:
                call = self._open.get(volume.name)
                if call is None:
                    call = _Call(path, work)
                    self._open[volume.name] = call
                    self._hand_out(volume.name, call)
                elif call.gave_up:
                    raise StorageUnavailable(f"{call.path} of volume {volume} still owes the answer to an earlier call")
            if not call.done.wait(deadline.remaining_s()):
                call.gave_up = True
                raise StorageUnavailable(f"{call.path} of volume {volume} did not answer within {timeout_s:g} s")
            if call.path == path:
                return call.result()

    def _hand_out(self, name: str, call: _Call) -> None:
        """Give the call to an idle thread, to a new one, or to whichever is free first. The lock is held."""
        self._waiting.put((name, call))
        if self._idle:
            self._idle -= 1
        elif self._threads < WORKERS:
            self._threads += 1
            threading.Thread(target=self._serve, name="volume-statistics", daemon=True).start()

    def _serve(self) -> None:
        while True:
            name, call = self._waiting.get()
            ended = False
            try:
                call.run()
                ended = True
            finally:
                with self._lock:
                    self._open.pop(name, None)
                    self._idle += ended
                    self._threads -= not ended
                call.done.set()
