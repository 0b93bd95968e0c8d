"""Watchdog to filesystems and devices that may never answer, asked from threads that may be lost to them.

One question at a time per volume: whoever asks while it is open shares its answer, and once it was given up the next
are told so at once. A thread that hangs in the kernel is written off and replaced, so that one dead volume takes no
time from the others; it goes when its device answers after all. The calls that change a volume are carried out by such
threads, too (`rpc.boundary`).
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from csi_driver.deadline import Deadline
from csi_driver.errors import DeadlineReached, DriverError, StorageUnavailable, same_again

WORKERS = 32
"""Threads that wait for answers at once, not counting those that were written off."""
LOST_LIMIT = 512
"""Threads that may be written off. Beyond that each further one is missing until a device answers."""
_FRAMES_SHOWN = 3
_PACKAGE = __name__.partition(".")[0] + "."

Answer = TypeVar("Answer")


class NotResponding(StorageUnavailable):
    """A filesystem or device did not answer in time, or is still blocked on an earlier question.

    `waits_in`: the functions of the driver that its thread is in, outermost first; empty before a thread took it up.
    """

    def __init__(self, message: str, waits_in: str) -> None:
        self.waits_in = waits_in
        super().__init__(message + f" (it waits in {waits_in})" * bool(waits_in))


@dataclass(slots=True)
class _Call(Generic[Answer]):
    """One question under way. `gave_up` once somebody waited for it in vain; `began` once a thread took it up."""

    about: str
    work: Callable[[], Answer]
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None
    failure: DriverError | None = None
    end: BaseException | None = None
    has_ended: bool = False
    gave_up: bool = False
    began: bool = False
    is_lost: bool = False
    thread: int = 0

    def run(self) -> None:
        try:
            self.answer = self.work()
            self.has_ended = True
        except DriverError as error:
            self.failure = error
        except BaseException as end:
            if isinstance(end, Exception):
                raise
            self.end = end  # of the program, which is its caller's to meet

    def result(self) -> Answer:
        if self.end is not None:
            raise self.end
        if self.failure is not None:
            raise same_again(self.failure) from self.failure
        if not self.has_ended:
            raise RuntimeError(f"the question about {self.about} ended by a bug; see its traceback")
        return self.answer  # type: ignore[return-value]  # None where that is an answer


class Watchdog(Generic[Answer]):
    """Watchdog under way, by volume, and the daemon threads that wait for the answers.

    Daemons: a thread that hangs in the kernel must not keep the program from ending.
    """

    def __init__(self, name: str, workers: int | None = None) -> None:
        self._name = name
        self._workers = workers or WORKERS
        self._changed = threading.Condition()
        self._open: dict[str, _Call[Answer]] = {}
        self._waiting: deque[tuple[str, _Call[Answer]]] = deque()
        self._threads = 0
        self._free = 0
        self._lost = 0

    def ask(self, volume: str, about: str, work: Callable[[], Answer], timeout_s: float) -> Answer:
        """Run `work` in a thread and return its result; an open question of the same volume about the same is shared.

        Raises `NotResponding` after `timeout_s`, or at once while a question that was given up is still open.
        """
        deadline = Deadline.after(timeout_s)
        while True:
            with self._changed:
                call = self._open.get(volume)
                if call is None:
                    call = _Call(about, work)
                    self._open[volume] = call
                    self._waiting.append((volume, call))
                    self._provide_thread()
                elif call.gave_up:
                    raise NotResponding(
                        f"{call.about} of volume {volume} is still blocked on an earlier call", _whereabouts(call)
                    )
            if not call.done.wait(deadline.remaining_s()):
                self._give_up(call)
                raise NotResponding(f"{call.about} of volume {volume} did not answer in time", _whereabouts(call))
            if call.about == about:
                return call.result()

    def _provide_thread(self) -> None:
        """See that somebody takes up what waits: threads that are free, or a new one. The lock is held."""
        if len(self._waiting) > self._free and self._threads < self._workers:
            # Not a DaemonPool: a thread that hangs in the kernel is written off and replaced.
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()
            self._threads += 1
            self._free += 1
        self._changed.notify()

    def _give_up(self, call: _Call[Answer]) -> None:
        with self._changed:
            call.gave_up = True
            if call.began and not call.is_lost and not call.done.is_set() and self._lost < LOST_LIMIT:
                call.is_lost = True
                self._lost += 1
                self._threads -= 1
                self._provide_thread()

    def _serve(self) -> None:
        call: _Call[Answer] | None = None
        try:
            while call is None or not call.is_lost:
                volume, call = self._next()
                self._carry_out(volume, call)
        finally:
            with self._changed:
                if call is not None and call.is_lost:
                    self._lost -= 1
                else:  # by a bug, which must not take the thread of those that wait
                    self._threads -= 1
                    self._free -= 1
                    self._provide_thread()

    def _next(self) -> tuple[str, _Call[Answer]]:
        with self._changed:
            while not self._waiting:
                self._changed.wait()
            volume, call = self._waiting.popleft()
            self._free -= 1
            call.began = True
            call.thread = threading.get_ident()
            return volume, call

    def _carry_out(self, volume: str, call: _Call[Answer]) -> None:
        try:
            if not call.gave_up:  # nobody waits any more for one that was given up before it began
                call.run()
        finally:
            with self._changed:
                self._open.pop(volume, None)
                if not call.is_lost:
                    # Before anybody can learn of the answer: whoever asks next needs no other thread.
                    self._free += 1
                call.done.set()


def _whereabouts(call: _Call[Answer]) -> str:
    """Name the innermost functions of the driver that carry out a call at this moment, the outermost of them first."""
    found: list[str] = []
    frame = sys._current_frames().get(call.thread)
    while frame is not None and len(found) < _FRAMES_SHOWN:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith(_PACKAGE) and module != __name__ and function.isidentifier():
            found.append(f"{module.removeprefix(_PACKAGE)}.{function}")
        frame = frame.f_back
    return " > ".join(reversed(found))


LENT_AFTER_S = 10 * 60.0
"""How long a place is held before it no longer counts: what hangs with its device keeps no other volume waiting."""
READING_LENT_AFTER_S = 4 * 3600.0


class _Places:
    """So many places; one that is held for longer than `lent_after_s` does not count any more."""

    def __init__(self, count: int, lent_after_s: float) -> None:
        self._count = count
        self._lent_after_s = lent_after_s
        self._changed = threading.Condition()
        self._taken_s: dict[object, float] = {}

    def take(self, timeout_s: float | None = None) -> object | None:
        """Return a place once there is one, None when there was none within the time; without a time, wait for it."""
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        place = object()
        with self._changed:
            while (free_in_s := self._free_in_s()) > 0:
                left_s = free_in_s if end_s is None else min(free_in_s, end_s - time.monotonic())
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
            self._taken_s[place] = time.monotonic()
        return place

    def give_back(self, place: object) -> None:
        """Let another have the place."""
        with self._changed:
            del self._taken_s[place]
            self._changed.notify_all()

    def _free_in_s(self) -> float:
        """Return when there is a place at the latest, 0 = now. The lock is held."""
        counting = sorted(self._lent_after_s - (time.monotonic() - began_s) for began_s in self._taken_s.values())
        return counting[len(counting) - self._count] if len(counting) >= self._count else 0.0


class HeavyOperations:
    """A limited number of places; who finds none waits inside its RPC, so that a boot storm meets no errors.

    Formatting, checking and growing take seconds and have the places. To read a whole volume may take hours: who does
    that gives its place to others meanwhile, so that a few large old volumes do not hold up every other one. As many
    volumes are read at once as there are places. A place is lent to others when its work takes very long: the device
    may hang, and its tool is never killed (`host.processes`).
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._places = _Places(places, LENT_AFTER_S)
        self._readers = _Places(places, READING_LENT_AFTER_S)
        self._held = threading.local()
        self._lock = threading.Lock()
        self._running = self._waiting = 0

    @contextmanager
    def place(self, what: str, *, deadline: Deadline) -> Iterator[None]:
        """Hold a place for the block. Raises `DeadlineReached` when none came free; `what` names the work."""
        with self._counted(waiting=1):
            place = self._places.take(deadline.remaining_s())
        if place is None:
            raise DeadlineReached(f"a place among the heavy operations of this node to {what}")
        self._held.place = place
        try:
            with self._counted(running=1):
                yield
        finally:
            self._places.give_back(self._held.place)

    def under_way(self) -> tuple[int, int]:
        """Return how many operations run, those that read a whole volume included, and how many wait for a place."""
        with self._lock:
            return self._running, self._waiting

    @contextmanager
    def _counted(self, *, running: int = 0, waiting: int = 0) -> Iterator[None]:
        with self._lock:
            self._running, self._waiting = self._running + running, self._waiting + waiting
        try:
            yield
        finally:
            with self._lock:
                self._running, self._waiting = self._running - running, self._waiting - waiting

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Give up the place that is held, for a block that reads a whole volume, and take one again afterwards.

        Both are waited for as long as it takes: what was read must not have to be read again.
        """
        self._places.give_back(self._held.place)
        try:
            reader = self._readers.take()
            try:
                yield
            finally:
                self._readers.give_back(reader)
        finally:
            self._held.place = self._places.take()
