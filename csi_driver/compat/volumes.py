# SPDX-License-Identifier: Apache-2.0
"""Keys and words of the drivers 1.4 and 1.9 in volumes, StorageClasses and Secrets, and their meaning. Pure.

`encryption: dmcrypt` has two meanings: 1.4 made a LUKS header on the node, and its StorageClasses also have
`dmcrypt/type` or `dmcrypt/cipher`; 1.9 asked the storage to encrypt.
"""

from __future__ import annotations

from collections.abc import Mapping

from csi_driver.publish_context import Encryption

METADATA_FIELD = "csi_metadata"
"""Field of a volume's document in which a management before `metadata` (API version 15) stores the metadata."""
NAMESPACE_KEY = "csi-storage-k8s-io/pvc/namespace"
"""Key of the metadata with the reference id of attachments."""
DMCRYPT = "dmcrypt"
LUKS_TYPE_KEY, CIPHER_KEY = "dmcrypt/type", "dmcrypt/cipher"
LUKS_KEYS = {LUKS_TYPE_KEY, CIPHER_KEY}
DMCRYPT_KEY = "dmcryptKey"
"""Key of the Secret with the passphrase."""


def is_node_encryption(parameters: Mapping[str, str]) -> bool:
    return parameters.get("encryption", "").strip().lower() == DMCRYPT and not LUKS_KEYS.isdisjoint(parameters)


def encryption_of(parameters: Mapping[str, str]) -> Encryption:
    """Return who encrypts an older driver's volume that the storage does not encrypt; UNKNOWN where it should.

    `dmcrypt` without its keys is a volume of 1.4, where they were optional; other words made plain volumes.
    """
    match parameters.get("encryption", "").strip().lower():
        case "luks" | "dmcrypt":
            return Encryption.LUKS
        case "native":
            return Encryption.UNKNOWN
    return Encryption.NONE


def passphrase_readings(text: str) -> tuple[str, ...]:
    """Return the passphrases that a Secret's value may mean, best first.

    1.4 let cryptsetup read up to the first line feed (cryptsetup(8), "Notes on passphrase processing"); headers made
    through the management use every byte. A line feed at the very end is never part of the passphrase.
    """
    line, feed, rest = text.partition("\n")
    if not feed or not line:
        return (text,)
    return (text, line) if rest else (line, text)
