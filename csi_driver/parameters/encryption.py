"""Who encrypts a new volume, and how: the `encryption` and `dmcrypt` keys of a StorageClass, and the key's Secret.

Two drivers of this name used one word, `encryption: dmcrypt`, for two things: 1.4 made a LUKS header on the node, and
its StorageClasses say `dmcrypt/type` and `dmcrypt/cipher` beside it; 1.9 asks the storage to encrypt by itself. The
keys beside the word tell the two apart; `native` and `luks` say it without them.

Nothing of a Secret's value is ever kept, logged or put into an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from csi_driver.errors import InvalidField, InvalidRequest, MissingField
from csi_driver.handover import Encryption
from csi_driver.model import MIB, AccessMode, Capability
from csi_driver.parameters import values as read
from csi_driver.storage_model import Vpg

SECRET_KEYS = ("passphrase", "dmcryptKey")
"""Keys of the Secret that may hold the passphrase: the 1.9 driver's and the 1.4 driver's."""
LUKS_HEADER_BYTES = 16 * MIB
"""What a LUKS2 header takes of a volume, made by the node with cryptsetup's own default or by the storage with its."""

_DOTTED = "encryption."
_OLD_KEYS = {"dmcrypt/type", "dmcrypt/cipher"}
_NATIVE_KEYS = {"encryption/headerSize", "encryption/slot", "encryption/numberOfSlots"}
_LUKS_KEYS = {"encryption/cipher", "encryption/pbkdf", "encryption/pbkdfMemory", "encryption/pbkdfIterations"}
_BOTH_KEYS = {"encryption/keySize", "encryption/allowDiscards"}
ENCRYPTION_KEYS = {"encryption"} | _OLD_KEYS | _NATIVE_KEYS | _LUKS_KEYS | _BOTH_KEYS
NODE_KEYS = tuple(sorted({"encryption", "encryption/keySize", "encryption/allowDiscards"} | _OLD_KEYS | _LUKS_KEYS))
"""What the node must know to make or open a LUKS header."""

_WORDS: Mapping[str, Encryption] = {
    "native": Encryption.NATIVE,
    "luks": Encryption.LUKS,
    "dmcrypt": Encryption.NATIVE,
}
_CIPHER = re.compile(r"[a-z0-9][a-z0-9:()_,-]{0,63}")
_TYPES = {name: name for name in ("luks", "luks1", "luks2")}
_PBKDFS = {name: name for name in ("argon2id", "argon2i", "pbkdf2")}
_SHORTEST, _LONGEST = 8, 4096
_SLOTS = 32
_LINE_BREAK = re.compile("[\n\r\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """Who is to encrypt a volume. `slot` and `key_size_bits` are what the storage is told when it does."""

    by: Encryption = Encryption.NONE
    header_bytes: int = 0
    """What of the volume its user does not get."""
    slot: int = 1
    key_size_bits: int = 512

    @property
    def is_native(self) -> bool:
        return self.by is Encryption.NATIVE

    def check_access(self, capabilities: Sequence[Capability]) -> None:
        """Refuse encryption by the nodes where several of them write: nothing keeps two from making the header."""
        if self.by is Encryption.LUKS and any(c.mode is AccessMode.MULTI_NODE_MULTI_WRITER for c in capabilities):
            raise InvalidRequest(
                f"encryption by the nodes does not go with access mode {AccessMode.MULTI_NODE_MULTI_WRITER}, "
                "wanted encryption by the storage (encryption: native) or one writing node"
            )

    def in_group(self, group: Vpg) -> EncryptionRequest:
        """Return what comes of the wish in a provisioning group, which may encrypt whatever is made in it."""
        if not group.is_encrypted:
            return self
        if self.by is Encryption.LUKS:
            raise InvalidRequest(
                f"volume provisioning group {group.name} makes volumes that the storage encrypts, "
                "wanted no encryption on the node beside it"
            )
        return replace(self, by=Encryption.NATIVE, header_bytes=group.header_bytes)


def normalized(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters with `encryption.slot` and its like spelled `encryption/slot`."""
    result: dict[str, str] = {}
    for key, value in parameters.items():
        plain = f"encryption/{key.removeprefix(_DOTTED)}" if key.startswith(_DOTTED) else key
        if plain in result and result[plain] != value:
            raise InvalidRequest(f"parameter {plain} is given twice, with a dot and with a slash, wanted it once")
        result[plain] = value
    return result


def encryption(own: Mapping[str, str]) -> EncryptionRequest:
    """Read who encrypts; a key that does not go with it is refused by name."""
    by = read.chosen(own, "encryption", _WORDS)
    if by is None:
        read.refuse_keys(own, ENCRYPTION_KEYS, "it needs the parameter encryption beside it, native or luks")
        return EncryptionRequest()
    if own["encryption"].strip().lower() == "dmcrypt" and _OLD_KEYS & own.keys():
        by = Encryption.LUKS
    if by is Encryption.LUKS:
        _check_luks(own)
        return EncryptionRequest(Encryption.LUKS, LUKS_HEADER_BYTES)
    return _native(own)


def _native(own: Mapping[str, str]) -> EncryptionRequest:
    read.refuse_keys(own, _OLD_KEYS | _LUKS_KEYS, "the storage encrypts by itself (wanted encryption: luks for it)")
    read.switch(own, "encryption/allowDiscards")
    header = read.number(own, "encryption/headerSize", 1, 100)
    if "vpg" in own and header not in (None, LUKS_HEADER_BYTES // MIB):
        raise InvalidField("parameters.encryption/headerSize", header, "16 where a provisioning group makes the volume")
    # The management has no field for the number of slots: a header has 32. It only bounds the slot that is used.
    slots = read.number(own, "encryption/numberOfSlots", 1, _SLOTS) or _SLOTS
    key_size = read.chosen(own, "encryption/keySize", {"256": 256, "512": 512})
    return EncryptionRequest(
        Encryption.NATIVE,
        LUKS_HEADER_BYTES if header is None else header * MIB,
        slot=read.number(own, "encryption/slot", 1, slots) or 1,
        key_size_bits=key_size or 512,
    )


def _check_luks(own: Mapping[str, str]) -> None:
    """Check shapes; what goes together, and what cryptsetup knows, the node finds out."""
    read.refuse_keys(own, _NATIVE_KEYS, "it is for encryption by the storage (wanted encryption: native for it)")
    read.chosen(own, "dmcrypt/type", _TYPES)
    for key in ("dmcrypt/cipher", "encryption/cipher"):
        read.text(own, key, _CIPHER, "a cipher, such as aes-xts-plain64")
    read.number(own, "encryption/keySize", 128, 1024)
    pbkdf = read.chosen(own, "encryption/pbkdf", _PBKDFS)
    memory = read.number(own, "encryption/pbkdfMemory", 32, 4 << 20)
    if pbkdf == "pbkdf2" and memory is not None:
        raise InvalidField("parameters.encryption/pbkdfMemory", memory, "no memory limit with pbkdf2, which takes none")
    read.number(own, "encryption/pbkdfIterations", 4, 100_000_000)
    read.switch(own, "encryption/allowDiscards")


def passphrase_in(secrets: Mapping[str, str]) -> str | None:
    """Return the passphrase that a Secret holds, under whichever of its names; None where it holds none."""
    found = {secrets[key] for key in SECRET_KEYS if secrets.get(key)}
    if len(found) > 1:
        raise InvalidRequest(f"secrets.{' and secrets.'.join(SECRET_KEYS)} differ, wanted one of them")
    return next(iter(found), None)


def required_passphrase(secrets: Mapping[str, str]) -> str:
    """Return a passphrase that the storage will take; `InvalidRequest` names the key, never the value."""
    passphrase = passphrase_in(secrets)
    field = next((f"secrets.{key}" for key in SECRET_KEYS if secrets.get(key)), f"secrets.{SECRET_KEYS[0]}")
    if passphrase is None:
        raise MissingField(f"{field} (or {SECRET_KEYS[1]}), which encrypts the volume,")
    if not _SHORTEST <= len(passphrase) <= _LONGEST:
        raise InvalidRequest(f"{field} has {len(passphrase)} characters, wanted {_SHORTEST} to {_LONGEST}")
    if _LINE_BREAK.search(passphrase):
        # The management's pattern has a dot, which fits no line break.
        raise InvalidRequest(f"{field} holds a line break, perhaps at its end, wanted none")
    return passphrase
