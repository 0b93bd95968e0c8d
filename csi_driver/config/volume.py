"""`nvmesh-csi volume`: its words, flags and settings."""

from __future__ import annotations

from csi_driver.config import shared
from csi_driver.config import values as read
from csi_driver.config.clusters import read_clusters
from csi_driver.config.controller import MANAGEMENT_FLAGS, clusters_place, management
from csi_driver.config.flags import Flag, Values
from csi_driver.config.made import VolumeCommand
from csi_driver.config.shared import DRIVER_NAME, LOG_FLAGS, ZONE, table

ALLOW_FORMAT, SHOW = "allow-format", "show"

_ACTION = Flag(
    "ACTION",
    read.choice(ALLOW_FORMAT, SHOW),
    SHOW,
    "",
    f"{SHOW}: print the volume, its attachments, and when it would be formatted. {ALLOW_FORMAT}: allow only the next"
    " attachment to format it over any data; the volume must be detached.",
)
_HANDLE = Flag("HANDLE", read.text, "", "", "Volume handle: volumeHandle of the PersistentVolume.")
_TIMEOUT = Flag("--timeout", read.seconds, 60.0, "60", "Time limit.", unit="seconds", metavar="TIME")

VOLUME_FLAGS = table(_ACTION, _HANDLE, _TIMEOUT, *MANAGEMENT_FLAGS, DRIVER_NAME, *LOG_FLAGS)


def volume(values: Values) -> VolumeCommand:
    """Make the settings of what is done by hand with one volume."""
    settings = management(values)
    place = clusters_place(values, settings)
    if place is not None:
        read_clusters(values, place)
    return VolumeCommand(
        log=shared.log(values),
        management=settings,
        zone=values.one(ZONE),
        clusters=place,
        action=values.one(_ACTION),
        handle=values.one(_HANDLE),
        timeout_s=values.one(_TIMEOUT),
    )
