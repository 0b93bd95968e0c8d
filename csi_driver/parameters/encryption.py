# SPDX-License-Identifier: Apache-2.0
"""The `encryption` keys of a StorageClass (older ones: `csi_driver.compat.volumes`), and the passphrase in its Secret.

No message shows a value of a Secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from csi_driver.compat import volumes as compat
from csi_driver.errors import InvalidRequest, MissingField, PreconditionFailed
from csi_driver.host_model import LuksSettings
from csi_driver.model import MIB, AccessMode, Capability
from csi_driver.parameters import values as read
from csi_driver.parameters.values import InvalidParameter
from csi_driver.publish_context import Encryption, PublishContext
from csi_driver.storage_model import LUKS_HEADER_BYTES, Vpg

ENCRYPTION = "encryption"
CIPHER, KEY_SIZE, DISCARDS = "encryption/cipher", "encryption/keySize", "encryption/allowDiscards"
PBKDF, MEMORY, ITERATIONS = "encryption/pbkdf", "encryption/pbkdfMemory", "encryption/pbkdfIterations"
_HEADER_SIZE, _SLOT, _SLOTS = "encryption/headerSize", "encryption/slot", "encryption/numberOfSlots"
PASSPHRASE_KEYS = ("passphrase", compat.DMCRYPT_KEY)
PREVIOUS_KEY = "previousPassphrase"

_DOTTED = re.compile(r"^encryption\.")
_NATIVE_KEYS = {_HEADER_SIZE, _SLOT, _SLOTS}
_LUKS_KEYS = {CIPHER, PBKDF, MEMORY, ITERATIONS}
NODE_KEYS = tuple(sorted({ENCRYPTION, KEY_SIZE, DISCARDS} | compat.LUKS_KEYS | _LUKS_KEYS))
"""Keys that the node needs to make or open a LUKS header."""
ENCRYPTION_KEYS = {*NODE_KEYS, *_NATIVE_KEYS}

_WORDS = {"native": Encryption.NATIVE, "luks": Encryption.LUKS, compat.DMCRYPT: Encryption.NATIVE}
_CIPHER = re.compile(r"[a-z0-9][a-z0-9:()_,-]{0,63}")
_TYPES = {name: name for name in ("luks", "luks1", "luks2")}
_PBKDFS = {name: name for name in ("argon2id", "argon2i", "pbkdf2")}
_DEFAULT_MEMORY_KIB = 64 * 1024
"""RFC 9106, section 4, for memory-constrained environments: each NodeStageVolume takes as much."""
_PASSPHRASE_CHARACTERS = range(8, 4097)
_MOST_SLOTS = 32
_LINE_BREAK = re.compile("[\n\r\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class EncryptionRequest:
    """Who encrypts a volume, and how much of it the LUKS header takes. `slot`, `key_size_bits`: for the storage."""

    by: Encryption = Encryption.NONE
    header_bytes: int = 0
    slot: int = 1
    key_size_bits: int = 512

    @property
    def is_native(self) -> bool:
        return self.by is Encryption.NATIVE

    def check_access(self, capabilities: Sequence[Capability]) -> None:
        """Refuse encryption by several writing nodes: two could make the header at the same time."""
        if self.by is Encryption.LUKS and any(c.mode is AccessMode.MULTI_NODE_MULTI_WRITER for c in capabilities):
            mode = AccessMode.MULTI_NODE_MULTI_WRITER
            action = "use encryption: native, or an access mode with one writing node"
            raise InvalidRequest(f"access mode {mode} cannot be used with encryption by the nodes; {action}")

    def in_group(self, group: Vpg) -> EncryptionRequest:
        if not group.is_encrypted:
            return self
        if self.by is Encryption.LUKS:
            action = "remove encryption: luks, or use another group"
            raise InvalidRequest(f"the storage encrypts the volumes of provisioning group {group.name}; {action}")
        return replace(self, by=Encryption.NATIVE, header_bytes=group.header_bytes)


def normalized(parameters: Mapping[str, str]) -> dict[str, str]:
    result: dict[str, str] = {}
    for key, value in parameters.items():
        plain = _DOTTED.sub("encryption/", key)
        if result.setdefault(plain, value) != value:
            raise InvalidRequest(f"parameter {plain} is given twice, with a dot and with a slash; keep one of them")
    return result


def parse_encryption(own: Mapping[str, str]) -> EncryptionRequest:
    by = encryption_kind(own)
    if by is Encryption.NONE:
        read.refuse_keys(own, ENCRYPTION_KEYS, "it needs the parameter encryption as well, native or luks")
        return EncryptionRequest()
    problems = read.Problems()
    problems.of(lambda: node_settings(by, own))
    if by is Encryption.LUKS:
        reason = "it is for encryption by the storage; use encryption: native with it"
        problems.of(lambda: read.refuse_keys(own, _NATIVE_KEYS, reason))
        request = EncryptionRequest(Encryption.LUKS, LUKS_HEADER_BYTES)
    else:
        request = problems.of(lambda: _native(own)) or EncryptionRequest()
    problems.raise_any()
    return request


def encryption_kind(own: Mapping[str, str]) -> Encryption:
    by = read.chosen(own, ENCRYPTION, _WORDS) or Encryption.NONE
    return Encryption.LUKS if by is not Encryption.NONE and compat.is_node_encryption(own) else by


def _native(own: Mapping[str, str]) -> EncryptionRequest:
    read.refuse_keys(own, compat.LUKS_KEYS | _LUKS_KEYS, "the storage makes the header; use encryption: luks with it")
    header = read.number(own, _HEADER_SIZE, 1, 100)
    if "vpg" in own and header not in (None, LUKS_HEADER_BYTES // MIB):
        raise InvalidParameter(_HEADER_SIZE, header, "16, as a volume provisioning group makes the volume")
    # The management has no field for the number of slots: a header has 32. It only bounds the slot that is used.
    slots = read.number(own, _SLOTS, 1, _MOST_SLOTS) or _MOST_SLOTS
    key_size = read.chosen(own, KEY_SIZE, {"256": 256, "512": 512})
    return EncryptionRequest(
        Encryption.NATIVE,
        LUKS_HEADER_BYTES if header is None else header * MIB,
        slot=read.number(own, _SLOT, 1, slots) or 1,
        key_size_bits=key_size or 512,
    )


def encrypted_by(context: PublishContext | None, volume_context: Mapping[str, str]) -> Encryption:
    """Return who encrypts, by the publish context, else the volume context. Raises `PreconditionFailed` if unknown."""
    if context is None:
        return encryption_kind(_set(volume_context))
    if context.encryption is Encryption.UNKNOWN:
        raise PreconditionFailed(f"volume {context.name}: unknown kind of encryption; upgrade this node plugin")
    return context.encryption


@dataclass(frozen=True, slots=True)
class EncryptionPlan:
    """How a node opens a volume. `spelled`: other readings of the passphrase. `previous`: replaced passphrases."""

    by: Encryption
    passphrase: str = field(repr=False)
    spelled: tuple[str, ...] = field(default=(), repr=False)
    previous: tuple[str, ...] = field(default=(), repr=False)
    settings: LuksSettings = field(default_factory=LuksSettings)
    allow_discards: bool = False

    @property
    def passphrases(self) -> tuple[str, ...]:
        return (self.passphrase, *self.spelled, *self.previous)

    def require_good_passphrase(self) -> None:
        _check_length("the passphrase in the secret", self.passphrase)


def plan_encryption(by: Encryption, own: Mapping[str, str], secrets: Mapping[str, str]) -> EncryptionPlan | None:
    if by is Encryption.NONE:
        return None
    settings, discards = node_settings(by, own)
    passphrase = passphrase_in(secrets)
    if passphrase is None:
        raise MissingField(f"secrets.{PASSPHRASE_KEYS[0]} (or secrets.{PASSPHRASE_KEYS[1]}), which opens the volume,")
    first, *others = compat.passphrase_readings(passphrase)
    previous = secrets.get(PREVIOUS_KEY, "")
    # Both may end with a line feed, and must not be taken for two: the replaced one is removed.
    replaced = [each for each in compat.passphrase_readings(previous) if each not in ("", first, *others)]
    return EncryptionPlan(by, first, tuple(others), tuple(replaced), settings, discards)


def node_settings(by: Encryption, context: Mapping[str, str]) -> tuple[LuksSettings, bool]:
    own = _set(context)
    problems = read.Problems()
    discards = problems.of(lambda: read.switch(own, DISCARDS)) or False
    settings = problems.of(lambda: _luks_settings(own)) if by is Encryption.LUKS else None
    problems.raise_any()
    return settings or LuksSettings(), discards


def _luks_settings(own: Mapping[str, str]) -> LuksSettings:
    read.chosen(own, compat.LUKS_TYPE_KEY, _TYPES)
    pbkdf = read.chosen(own, PBKDF, _PBKDFS) or ""
    memory = read.number(own, MEMORY, 32, 4 << 20)
    if pbkdf == "pbkdf2" and memory is not None:
        raise InvalidParameter(MEMORY, memory, "no value: pbkdf2 has no memory limit")
    cipher = _cipher(own)  # cryptsetup knows which there are
    return LuksSettings(
        cipher=cipher,
        key_bits=_key_bits(own, cipher),
        pbkdf=pbkdf,
        pbkdf_memory_kib=memory or (0 if pbkdf == "pbkdf2" else _DEFAULT_MEMORY_KIB),
        pbkdf_iterations=read.number(own, ITERATIONS, 4, 100_000_000) or 0,
    )


def _cipher(own: Mapping[str, str]) -> str:
    expected = "a cipher as cryptsetup spells it, such as aes-xts-plain64"
    cipher, old_cipher = (read.text(own, key, _CIPHER, expected) for key in (CIPHER, compat.CIPHER_KEY))
    if cipher and old_cipher and cipher != old_cipher:
        raise InvalidParameter(compat.CIPHER_KEY, old_cipher, f"the value of {CIPHER}, or only one of the two keys")
    return cipher or old_cipher or ""


def _key_bits(own: Mapping[str, str], cipher: str) -> int:
    bits = read.number(own, KEY_SIZE, 128, 1024) or 0
    is_xts = not cipher or "-xts-" in cipher
    if bits and (bits % 64 or (is_xts and bits not in (256, 512))):
        expected = "256 or 512 (bits: xts has two keys of half the size)" if is_xts else "a multiple of 64 (bits)"
        raise InvalidParameter(KEY_SIZE, own[KEY_SIZE], expected)
    return bits


def _set(context: Mapping[str, str]) -> dict[str, str]:
    """Leave out blank values: in a static PersistentVolume they set nothing."""
    return {key: value.strip() for key, value in context.items() if value.strip()}


def passphrase_in(secrets: Mapping[str, str]) -> str | None:
    found = {secrets[key] for key in PASSPHRASE_KEYS if secrets.get(key)}
    if len(found) > 1:
        raise InvalidRequest(f"secrets.{' and secrets.'.join(PASSPHRASE_KEYS)} differ; keep one of them")
    return next(iter(found), None)


def required_passphrase(secrets: Mapping[str, str]) -> str:
    """Return a passphrase that the storage accepts. Raises `InvalidRequest` naming the key, never the value."""
    passphrase = passphrase_in(secrets)
    name = next((f"secrets.{key}" for key in PASSPHRASE_KEYS if secrets.get(key)), f"secrets.{PASSPHRASE_KEYS[0]}")
    if passphrase is None:
        raise MissingField(f"{name} (or {PASSPHRASE_KEYS[1]}), which encrypts the volume,")
    _check_length(name, passphrase)
    if _LINE_BREAK.search(passphrase):  # the management's pattern has a dot, which matches none
        raise InvalidRequest(f"{name}: expected no line break, which the storage refuses; see its end")
    return passphrase


def _check_length(name: str, passphrase: str) -> None:
    if len(passphrase) not in _PASSPHRASE_CHARACTERS:
        raise InvalidRequest(f"{name}: expected 8 to 4096 characters, got {len(passphrase)}")
