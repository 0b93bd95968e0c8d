# SPDX-License-Identifier: Apache-2.0
"""Marks of this driver's connections in libnvme's registry: `nvme disconnect-all` and other programs leave them alone.

One directory for each controller, with a file that names the owner (nvme-cli 3, libnvme/design/REGISTRY.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

_LOG = logging.getLogger(__name__)
_OWNER, _OWN = "owner", "nvmesh-csi"
_WRITABLE_BY_OTHERS = 0o022


@dataclass(frozen=True, slots=True)
class Owners:
    """The registry. Without it connections are as good: failures are only logged."""

    directory: Path = Path("/run/nvme/registry")

    def mark(self, controller: str) -> None:
        """Name this driver as owner of a new controller; a mark that it finds is that of an earlier one."""
        place = self.directory / controller
        draft = place / f".{_OWNER}.{os.getpid()}"
        try:
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
            status = self.directory.lstat()
            if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_BY_OTHERS:
                raise PermissionError(f"{self.directory} is not this user's alone")
            draft.write_text(_OWN)
            draft.replace(place / _OWNER)
        except OSError as problem:
            _LOG.warning("`nvme disconnect-all` would end the connection %s: %s", controller, problem)

    def sweep(self, exists: Callable[[str], bool], present: Collection[str]) -> None:
        """Remove this driver's marks of controllers that are gone."""
        try:
            gone = set(os.listdir(self.directory)).difference(present)
        except FileNotFoundError:
            return
        for name in gone:
            place = self.directory / name
            try:
                if (place / _OWNER).read_text() == _OWN and not exists(name):
                    for draft in place.glob(f".{_OWNER}.*"):
                        draft.unlink(missing_ok=True)
                    (place / _OWNER).unlink(missing_ok=True)
                    place.rmdir()  # never what another program has put there
            except FileNotFoundError:
                continue
            except OSError as problem:
                _LOG.warning("the mark of an earlier connection is left in %s: %s", place, problem)
