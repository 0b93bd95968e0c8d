"""Questions to filesystems and devices that may never answer, asked from threads that may be lost to them.

One question at a time per volume: whoever asks while it is open shares its answer, and once it was given up the next
are told so at once. A thread that hangs in the kernel is written off and replaced, so that one dead volume takes no
time from the others; it goes when its device answers after all. The calls that change a volume are carried out by such
threads, too (`rpc.boundary`).
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from csi_driver.deadline import Deadline
from csi_driver.errors import DriverError, StorageUnavailable, same_again

WORKERS = 32
"""Threads that wait for answers at once, not counting those that were written off."""
LOST_LIMIT = 512
"""Threads that may be written off. Beyond that each further one is missing until a device answers."""
_FRAMES_SHOWN = 3
_PACKAGE = __name__.partition(".")[0] + "."

Answer = TypeVar("Answer")


class NoAnswer(StorageUnavailable):
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


class Questions(Generic[Answer]):
    """Questions under way, by volume, and the daemon threads that wait for the answers.

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

        Raises `NoAnswer` after `timeout_s`, or at once while an earlier question about the volume, given up before, is
        still open.
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
                    raise NoAnswer(
                        f"{call.about} of volume {volume} is still blocked on an earlier call", _whereabouts(call)
                    )
            if not call.done.wait(deadline.remaining_s()):
                self._give_up(call)
                raise NoAnswer(f"{call.about} of volume {volume} did not answer in time", _whereabouts(call))
            if call.about == about:
                return call.result()

    def _provide_thread(self) -> None:
        """See that somebody takes up what waits: threads that are free, or a new one. The lock is held."""
        if len(self._waiting) > self._free and self._threads < self._workers:
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
