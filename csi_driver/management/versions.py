"""Versions of the management's API: what a server says, whether the driver can work with it, and what it offers.

The API was numbered 15, 16 (a string or a number), and since then like 17.2.0 and 18.0.0.
"""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass

from csi_driver.errors import PreconditionFailed, shown
from csi_driver.storage_model import Feature

_log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"[vV]?(\d{1,6}(?:\.\d{1,6}){0,5})(?:[-+].*)?")
_LOWEST = (15,)
"""The first that keeps `metadata` with a volume: without it nothing is known again of what was made."""
_NEWEST = (18,)
"""The newest that the driver was written for."""


class ManagementTooOld(PreconditionFailed):
    """The management lacks what the driver cannot do without."""

    def __init__(self, server: str, found: str, wanted: str) -> None:
        super().__init__(
            f"management server {server}: expected {wanted} or newer, got {found}; upgrade the management, or set "
            "--allow-incompatible-versions to continue at your own risk"
        )


@dataclass(frozen=True, slots=True)
class ApiVersion:
    """What a server says of its API. `numbers` is None where that cannot be read, and () where it says nothing."""

    text: str
    numbers: tuple[int, ...] | None

    @classmethod
    def read(cls, value: object) -> ApiVersion:
        """Read the value of `APIVersion`: a number, or text like "16" and "17.2.0"."""
        if value is None or value == "":
            return cls("", ())
        text = value.strip() if isinstance(value, str) else str(value)
        match = _NUMBERED.fullmatch(text) if not isinstance(value, bool) else None
        return cls(text, tuple(int(part) for part in match[1].split(".")) if match is not None else None)

    def offers(self, feature: Feature) -> bool:
        """Tell whether a server of this version has the feature; what cannot be read is taken for a newer one."""
        return self.numbers is None or self.numbers >= feature.value

    def __str__(self) -> str:
        return f"API version {shown(self.text)}" if self.text else "an API without a version"


class VersionRule:
    """Judges the versions of one server's API, and warns once of each that is let through. Thread-safe."""

    def __init__(self, server: str, *, allow_incompatible: bool) -> None:
        self._server = server
        self._allow_incompatible = allow_incompatible
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def judge(self, version: ApiVersion) -> None:
        """Raise `ManagementTooOld` for what is below the lowest version, unless that is allowed."""
        numbers = version.numbers
        lowest = ".".join(map(str, _LOWEST))
        if numbers is None:
            self._warn(version, "which is unreadable and treated as newer")
        elif numbers < _LOWEST:
            if not self._allow_incompatible:
                raise ManagementTooOld(self._server, str(version), f"API version {lowest}")
            self._warn(version, f"older than the lowest supported ({lowest}); allowed by --allow-incompatible-versions")
        elif numbers[:1] > _NEWEST:
            self._warn(version, f"newer than the newest tested ({_NEWEST[0]})")

    def _warn(self, version: ApiVersion, what: str) -> None:
        with self._lock:
            if version.text in self._warned:
                return
            self._warned.add(version.text)
        _log.warning("management server %s has %s, %s", self._server, version, what)
