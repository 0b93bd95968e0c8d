"""Which volumes of a driver kubelet has mounted here, by the mount table and kubelet's own records.

No filesystem of a volume is touched, so nothing hangs however dead one is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_driver.node.mount_owner import publication_record, staging_record


@dataclass(frozen=True, slots=True)
class Held:
    """One mount of a volume: staged, or published to a pod. `handle` is empty where kubelet has no record of it."""

    path: Path
    handle: str

    @property
    def name(self) -> str:
        """The handle, else where it is mounted."""
        return self.handle or str(self.path)


def held_in(paths: Iterable[Path], driver_name: str) -> Iterator[Held]:
    """Return those of these mount points that are this driver's, in kubelet's layout."""
    for path in paths:
        staged = staging_record(path, driver_name)
        record = staged or publication_record(path)
        noted = _noted(record) if record is not None else {}
        if staged is not None or noted.get("driverName") == driver_name:
            yield Held(path, str(noted.get("volumeHandle") or ""))


def _noted(record: Path) -> dict[str, object]:
    try:
        document = json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
