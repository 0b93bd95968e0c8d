# SPDX-License-Identifier: Apache-2.0
"""Findings that people should see where they look; `csi_driver.kubernetes.events` records them as Kubernetes Events.

docs/events.md has each reason, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

from csi_driver.model import Claim


class EventReason(StrEnum):
    """Reasons of events, with their action and type. docs/events.md promises that they do not change."""

    action: str
    type: str

    def __new__(cls, word: str, action: str, type_: str = "Warning") -> Self:
        made = str.__new__(cls, word)
        made._value_, made.action, made.type = word, action, type_
        return made

    # Reported by the node.
    CONTENT_REFUSED = "VolumeContentRefused", "Stage"
    VOLUME_IN_USE = "VolumeInUse", "Unstage"
    MOUNT_LOST = "VolumeMountLost", "Unmount"
    MOUNT_CLEANED_UP = "VolumeMountCleanedUp", "Unmount", "Normal"
    GROWS_AT_NEXT_MOUNT = "VolumeGrowsAtNextMount", "Expand"
    # Reported by the controller.
    TAKEN_OVER = "VolumeTakenOver", "Attach"
    NOT_DETACHED = "VolumeNotDetached", "Detach"
    SPACE_NEARLY_PROMISED = "SpaceNearlyPromised", "Provision"
    SPACE_AVAILABLE = "SpaceAvailable", "Provision", "Normal"


@dataclass(frozen=True, slots=True)
class Subject:
    """Objects that a finding is about; an event is recorded on each.

    `claim`: of the volume; else `volume_id`, with which the recorder may find it. `node`: name of a node; of the
    process's own node by default. Without any of them the finding is about the driver.
    """

    claim: Claim | None = None
    node: str = ""
    volume_id: str = ""


class Reporter(Protocol):
    def report(self, subject: Subject, reason: EventReason, note: str) -> None:
        """Report a finding; returns at once and never raises.

        Equal reports count as one: `note` has no times, counts or other numbers that change, and no secret.
        """


class _Silent:
    def report(self, subject: Subject, reason: EventReason, note: str) -> None:
        pass


SILENT: Reporter = _Silent()
"""Reports nothing; the default."""
