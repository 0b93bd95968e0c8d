# SPDX-License-Identifier: Apache-2.0
"""Files that this process opens and directories that it lists, by the interpreter's audit events."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LISTING = ("os.listdir", "os.scandir")
_recordings: list[list[str]] = []
_installed: list[bool] = []


@contextmanager
def opened() -> Iterator[list[str]]:
    """Give the paths opened or listed during the block, in order, by any thread; "(list) " before the latter."""
    if not _installed:
        sys.addaudithook(_hear)  # it cannot be removed again
        _installed.append(True)
    paths: list[str] = []
    _recordings.append(paths)
    try:
        yield paths
    finally:
        _recordings.remove(paths)


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _recordings and (event == "open" or event in _LISTING):
        place = arguments[0]
        path = os.fsdecode(place) if isinstance(place, (str, bytes, os.PathLike)) else f"descriptor {place}"
        for paths in _recordings:
            paths.append(path if event == "open" else f"(list) {path}")
