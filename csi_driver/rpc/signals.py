"""The wish of the supervisor that we end: SIGTERM or SIGINT, and at once when it comes a second time."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Self

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Termination:
    """Catches the signals inside its block, in the main thread. The second one ends the process on the spot."""

    def __init__(self) -> None:
        self._count = 0
        self._reader, self._writer, self._wakeup_before = -1, -1, -1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # The interpreter writes to the pipe as the signal comes, in whatever thread. A handler of ours runs only when
        # the main thread next runs Python code, and that may be never: a signal just before a blocking read is not
        # seen by it (signal.set_wakeup_fd).
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._received) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave back
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._reader)
        os.close(self._writer)

    def wait(self) -> None:
        """Return when the first signal has come."""
        os.read(self._reader, 1)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        if self._count > 1:
            os._exit(128 + number)
