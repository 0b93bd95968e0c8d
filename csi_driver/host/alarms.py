"""Something to wait on while a device is awaited: udev's events where udev runs, otherwise the clock.

An event only ends a pause early. Nothing that udev says of a device is taken over, and no pause is long: the size of
a device changes without any event, and in a container's network namespace none arrives.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

from csi_driver.deadline import SYSTEM_CLOCK, Clock

_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1
_LONGEST_EVENT_WAIT_S = 0.25


class _Monitor(Protocol):
    """The part of pyudev.Monitor that is used; pyudev has no type information."""

    def filter_by(self, subsystem: str) -> None: ...

    def start(self) -> None: ...

    def poll(self, timeout: float) -> object: ...


@contextlib.contextmanager
def device_alarm(clock: Clock, udev_control: Path) -> Iterator[Callable[[float], None]]:
    """Give a function that pauses until a block device may have changed, at most the seconds it is given."""
    monitor: _Monitor | None = None
    pause_s = _FIRST_PAUSE_S
    # udev's events come in real time, so a replaced clock never waits for them.
    tries_udev = clock is SYSTEM_CLOCK and udev_control.exists()

    def pause(most_s: float) -> None:
        nonlocal monitor, pause_s, tries_udev
        if tries_udev:
            tries_udev = False
            monitor = _start_monitor()
            return  # look once more now that no event can be missed
        if monitor is not None:
            monitor.poll(timeout=min(most_s, _LONGEST_EVENT_WAIT_S))
            return
        clock.sleep(min(most_s, pause_s))
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    yield pause


def _start_monitor() -> _Monitor | None:
    try:
        pyudev = importlib.import_module("pyudev")
        monitor = cast(_Monitor, pyudev.Monitor.from_netlink(pyudev.Context()))
        monitor.filter_by("block")
        monitor.start()
    except (ImportError, OSError):
        return None
    return monitor
