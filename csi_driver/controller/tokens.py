"""Tokens of ListVolumes: where the next page begins. They have a form of their own, that no volume's name has."""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass

from csi_driver.errors import StaleToken, shown

_VERSION = "v1."
LAST = "~"
"""The mark above every spelling of a volume's handle: the volume is done with."""


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
            raise StaleToken(f"starting_token {shown(token)} was not issued by this driver")
        encoded = token.removeprefix(_VERSION)
        text = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True).decode()
        zone_mark, name, spelling = text.split("\n")
    except (binascii.Error, ValueError) as problem:
        raise StaleToken(f"starting_token {shown(token)} was not issued by this driver") from problem
    return Position(zone_mark, name, spelling)


def mark(text: str) -> str:
    """Return a short stand-in for a zone or a spelling."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
