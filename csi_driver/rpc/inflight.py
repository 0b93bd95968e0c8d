"""Which calls may not run at the same time: the claims of a call, held while it runs.

A claim is a key, held alone or shared. Contention is answered at once: nothing ever waits here
(CSI specification, "Concurrency" and the ABORTED rows of the error tables).
"""

from __future__ import annotations

import posixpath
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from csi_driver.errors import OperationPending, shown
from csi_driver.model import VolumeHandle

Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a call needs for itself, or together with others that share it. `shown_as` names it in messages."""

    key: Key
    shown_as: str
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Claims:
    """How requests become claims: of the volume's name in the storage, in whatever zone.

    Handles of one volume may name its zone, or none, or a name that the zone had before, and the zones change while
    the driver runs. Two volumes of one name in two zones wait for each other, which costs a repetition and no more.
    `volume_name` derives the storage's name of a volume from its CSI name.
    """

    volume_name: Callable[[str], str]

    def creation(self, csi_name: str) -> tuple[Claim, ...]:
        """Claim the name that the volume will have."""
        return (Claim(("name", self.volume_name(csi_name)), f"volume {shown(csi_name)}"),)

    def volume(self, volume_id: str, *, shared: bool = False) -> tuple[Claim, ...]:
        """Claim the volume that the handle means, however it is spelled."""
        handle = VolumeHandle.parse(volume_id)
        what = f"volume {shown(volume_id)}"
        if handle is None:
            return (Claim(("strange", volume_id), what, shared),)
        return (Claim(("name", handle.name), what, shared),)

    def named(self, name: str) -> tuple[Claim, ...]:
        """Claim the storage's name of a volume: against every call that is about it."""
        return (Claim(("name", name), f"volume {shown(name)}"),)

    def path(self, path: str) -> tuple[Claim, ...]:
        """Claim a staging or target path."""
        return (Claim(("path", posixpath.normpath(path)), f"path {shown(path)}"),)


class InFlight:
    """The claims held now. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # How many share the key; -1 = held alone.
        self._held: dict[Key, int] = {}

    @contextmanager
    def holding(self, claims: Sequence[Claim]) -> Iterator[None]:
        """Hold all the claims inside the block. Raises `OperationPending` at once when one of them conflicts."""
        self._take(claims)
        try:
            yield
        finally:
            self._release(claims)

    def _take(self, claims: Sequence[Claim]) -> None:
        with self._lock:
            for claim in claims:
                count = self._held.get(claim.key, 0)
                if count < 0 or (count > 0 and not claim.shared):
                    raise OperationPending(f"another operation on {claim.shown_as} is still running; retry")
            for claim in claims:
                self._held[claim.key] = self._held.get(claim.key, 0) + 1 if claim.shared else -1

    def _release(self, claims: Sequence[Claim]) -> None:
        with self._lock:
            for claim in claims:
                count = self._held[claim.key]
                if count > 1:
                    self._held[claim.key] = count - 1
                else:
                    del self._held[claim.key]

    def held(self) -> int:
        """Return how many keys are held now."""
        with self._lock:
            return len(self._held)
