"""Locks by name, and the switches by which tests hold work back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Locks:
    """One lock per name, made when needed and forgotten when free."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Hold the lock of `name`, waiting for whoever has it."""
        with self._guard:
            lock, users = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, users = self._locks[name]
                if users == 1:
                    del self._locks[name]
                else:
                    self._locks[name] = (lock, users - 1)


class Holds:
    """Work that tests hold back: "initialize", "extend", "encrypt", "reclaim", "delete", "client:<name>" (it is DOWN),
    "slow:<name>" (it is not)."""

    def __init__(self) -> None:
        self._held: frozenset[str] = frozenset()

    def __contains__(self, kind: str) -> bool:
        return kind in self._held

    def set(self, kind: str, held: bool) -> None:
        self._held = self._held | {kind} if held else self._held - {kind}
