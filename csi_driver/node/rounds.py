"""Do something now and then, in a thread beside the calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from csi_driver.errors import DriverError

logger = logging.getLogger(__name__)


class Rounds:
    """Runs `work` at once and every `interval_s` seconds inside a with-block; 0 = never.

    The thread is a daemon: work that hangs in the kernel must not keep the program from ending.
    """

    def __init__(self, work: Callable[[], object], interval_s: float, *, name: str) -> None:
        self._work = work
        self._interval_s = interval_s
        self._name = name
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        if self._interval_s > 0:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._work()
            except DriverError as error:
                logger.warning("%s: %s; tried again in %g s", self._name, error, self._interval_s)
            self._ended.wait(self._interval_s)
