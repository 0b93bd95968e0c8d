"""Pages of ListVolumes: how large one may be, and the tokens that say where the next one begins.

The tokens have a form of their own, that no volume's name has.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from csi_driver.errors import StaleToken, shown
from csi_driver.health import VolumeHealth
from csi_driver.model import ListedVolume

_VERSION = "v1."
LAST = "~"
"""The mark above every spelling of a volume's handle: the volume is done with."""

PAGE_BYTES = 3 << 20
"""A page ends below this, also where everything was asked for: gRPC's clients take 4 MiB unless told otherwise, and
external-attacher, which asks for everything, follows tokens."""
_FIELD_BYTES = 6  # tag and length of a text or of a message within another, at most
_FIXED_BYTES = 64  # numbers, and the messages around


@dataclass(frozen=True, slots=True)
class Position:
    """The last entry of a page: its zone (hashed, tokens are short), its volume, and which spelling of its handle."""

    zone_mark: str
    name: str
    spelling: str = LAST

    def token(self) -> str:
        """Write the token, at most 128 bytes."""
        text = f"{self.zone_mark}\n{self.name}\n{self.spelling}"
        return _VERSION + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_token(token: str) -> Position:
    """Read a token; `StaleToken` for what this driver did not issue."""
    try:
        if not token.startswith(_VERSION):
            raise StaleToken(
                f"starting_token {shown(token)} was not issued by this driver; start again without a token"
            )
        encoded = token.removeprefix(_VERSION)
        text = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
        zone_mark, name, spelling = text.split("\n")
    except (binascii.Error, ValueError) as problem:
        raise StaleToken(
            f"starting_token {shown(token)} was not issued by this driver; start again without a token"
        ) from problem
    return Position(zone_mark, name, spelling)


def mark(text: str) -> str:
    """Return a short stand-in for a zone or a spelling."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def listed_bytes(entry: ListedVolume) -> int:
    """Return an upper bound for the bytes that an entry of ListVolumes takes in a message."""
    volume = entry.volume
    size = _FIXED_BYTES + sum(map(_text_bytes, (volume.volume_id, *entry.published_node_ids)))
    for pairs in (volume.context, *volume.topology):
        size += _FIELD_BYTES + sum(_FIELD_BYTES + _text_bytes(key) + _text_bytes(pairs[key]) for key in pairs)
    return size


def health_bytes(health: VolumeHealth) -> int:
    """Return an upper bound for the bytes that an entry of ControllerListVolumeHealth takes in a message."""
    return _text_bytes(health.volume_id) + sum(
        _FIXED_BYTES + _text_bytes(entry.reason) + _text_bytes(entry.message) for entry in health.entries
    )


def _text_bytes(text: str) -> int:
    return _FIELD_BYTES + len(text.encode("utf-8", "surrogatepass"))
