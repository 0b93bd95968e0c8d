"""Who encrypts a volume, and what a StorageClass and its Secret say of it. Pure; checked before any device is touched.

Nothing of a Secret's values is kept in a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.errors import InvalidField, InvalidRequest, MissingField, PreconditionFailed
from csi_driver.handover import Encryption, PublishContext
from csi_driver.machine import LuksSettings

PASSPHRASE_KEYS = ("passphrase", "dmcryptKey")
"""Where a Secret has the passphrase: the 1.9 driver's name and the 1.4 driver's."""
PREVIOUS_KEY = "previousPassphrase"
ENCRYPTION, TYPE, OLD_CIPHER = "encryption", "dmcrypt/type", "dmcrypt/cipher"
CIPHER, KEY_SIZE, DISCARDS = "encryption/cipher", "encryption/keySize", "encryption/allowDiscards"
PBKDF, MEMORY, ITERATIONS = "encryption/pbkdf", "encryption/pbkdfMemory", "encryption/pbkdfIterations"

HEADER_BYTES = 16 << 20
"""What a LUKS2 header takes by cryptsetup's default, and a native one by the management's."""
_DEFAULT_MEMORY_KIB = 64 * 1024
"""RFC 9106, section 4, the recommendation for memory-constrained places: every start of a pod costs as much."""
_MEMORY_KIB = (32, 4 << 20)
_ITERATIONS = (4, 100_000_000)
_KEY_BITS = (128, 1024)
_SHORTEST, _LONGEST = 8, 4096
_CIPHER = re.compile(r"[a-z0-9][a-z0-9:()_,-]{0,63}")
_TYPES = ("luks", "luks1", "luks2")
_PBKDFS = ("argon2id", "argon2i", "pbkdf2")


@dataclass(frozen=True, slots=True)
class EncryptionPlan:
    """How a volume is to be opened, and by whom it is encrypted: NATIVE or LUKS.

    `spelled` is how else the passphrase may have been understood when the header was made, `previous` what it is to
    replace (see `spellings`).
    """

    by: Encryption
    passphrase: str = field(repr=False)
    spelled: tuple[str, ...] = field(default=(), repr=False)
    previous: tuple[str, ...] = field(default=(), repr=False)
    settings: LuksSettings = field(default_factory=LuksSettings)
    allow_discards: bool = False

    @property
    def passphrases(self) -> tuple[str, ...]:
        """What may open the volume, best first."""
        return (self.passphrase, *self.spelled, *self.previous)

    def require_good_passphrase(self) -> None:
        """Refuse to begin with a passphrase that the storage would not take either."""
        if not _SHORTEST <= len(self.passphrase) <= _LONGEST:
            raise InvalidRequest(
                f"the passphrase in the secret has {len(self.passphrase)} characters, wanted {_SHORTEST} to {_LONGEST}"
            )


def encrypted_by(context: PublishContext | None, volume_context: Mapping[str, str]) -> Encryption:
    """Tell who encrypts a volume. Without a word of the controller's, its StorageClass's word counts.

    Raises `PreconditionFailed` where the controller says what this node does not understand.
    """
    if context is None:
        return _by_parameters(volume_context)
    if context.encryption is Encryption.UNKNOWN:
        raise PreconditionFailed(
            f"volume {context.name} is encrypted in a way that this node does not know: its plugin is older than the "
            "controller's, update it"
        )
    return context.encryption


def _by_parameters(own: Mapping[str, str]) -> Encryption:
    match own.get(ENCRYPTION, "").strip().lower():
        case "":
            return Encryption.NONE
        case "luks":
            return Encryption.LUKS
        case "native":
            return Encryption.NATIVE
        case "dmcrypt":
            return Encryption.LUKS if TYPE in own or OLD_CIPHER in own else Encryption.NATIVE
    raise InvalidField(ENCRYPTION, own[ENCRYPTION], "luks, native or dmcrypt")


def plan_encryption(by: Encryption, own: Mapping[str, str], secrets: Mapping[str, str]) -> EncryptionPlan | None:
    """Check all that is asked of a volume's encryption; None where nobody encrypts it.

    `own` are the StorageClass's keys. Raises `InvalidField` naming one, `MissingField` naming the Secret's.
    """
    if by is Encryption.NONE:
        return None
    settings, discards = _settings(own), _switch(own, DISCARDS)
    passphrase = passphrase_in(secrets)
    if passphrase is None:
        raise MissingField(f"secrets.{PASSPHRASE_KEYS[0]} (or secrets.{PASSPHRASE_KEYS[1]}), which opens the volume,")
    first, *others = spellings(passphrase)
    previous = secrets.get(PREVIOUS_KEY, "")
    replaced = spellings(previous) if previous not in ("", passphrase) else ()
    return EncryptionPlan(by, first, tuple(others), replaced, settings, discards)


def passphrase_in(secrets: Mapping[str, str]) -> str | None:
    """Return the passphrase that a Secret holds; None where it holds none. Two that differ are refused."""
    found = {secrets[key] for key in PASSPHRASE_KEYS if secrets.get(key)}
    if len(found) > 1:
        raise InvalidRequest(f"secrets.{' and secrets.'.join(PASSPHRASE_KEYS)} differ, wanted one of them")
    return next(iter(found), None)


def spellings(text: str) -> tuple[str, ...]:
    """Return what a Secret's value may mean as a passphrase, best first.

    The 1.4 driver let cryptsetup read it like something typed, up to the first line feed (cryptsetup(8), "Notes on
    passphrase processing"); whoever makes headers through the management passes every byte. A line feed at the very end
    was meant by nobody.
    """
    line, feed, rest = text.partition("\n")
    if not feed or not line:
        return (text,)
    return (text, line) if rest else (line, text)


def _settings(own: Mapping[str, str]) -> LuksSettings:
    _chosen(own, TYPE, _TYPES)
    pbkdf = _chosen(own, PBKDF, _PBKDFS)
    memory = _number(own, MEMORY, _MEMORY_KIB)
    if pbkdf == "pbkdf2" and memory:
        raise InvalidField(MEMORY, own[MEMORY], "no memory limit with pbkdf2, which takes none")
    cipher = _cipher(own)
    return LuksSettings(
        cipher=cipher,
        key_bits=_key_bits(own, cipher),
        pbkdf=pbkdf,
        pbkdf_memory_kib=memory or (0 if pbkdf == "pbkdf2" else _DEFAULT_MEMORY_KIB),
        pbkdf_iterations=_number(own, ITERATIONS, _ITERATIONS),
    )


def _cipher(own: Mapping[str, str]) -> str:
    given = {key: own[key].strip() for key in (CIPHER, OLD_CIPHER) if own.get(key, "").strip()}
    for key, value in given.items():
        if _CIPHER.fullmatch(value) is None:
            raise InvalidField(key, value, "a cipher as cryptsetup spells it, such as aes-xts-plain64")
    if len(set(given.values())) > 1:
        raise InvalidField(OLD_CIPHER, given[OLD_CIPHER], f"the same as {CIPHER}, or only one of them")
    return next(iter(given.values()), "")


def _key_bits(own: Mapping[str, str], cipher: str) -> int:
    bits = _number(own, KEY_SIZE, _KEY_BITS)
    is_xts = not cipher or "-xts-" in cipher
    if bits and (bits % 64 or (is_xts and bits not in (256, 512))):
        wanted = "256 or 512 bits (two keys) with xts" if is_xts else "a multiple of 64 bits"
        raise InvalidField(KEY_SIZE, own[KEY_SIZE], wanted)
    return bits


def _number(own: Mapping[str, str], key: str, bounds: tuple[int, int]) -> int:
    """Return the number under a key; 0 where there is none."""
    text = own.get(key, "").strip()
    if not text:
        return 0
    least, most = bounds
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise InvalidField(key, text, f"a number from {least} to {most}")
    return int(text)


def _chosen(own: Mapping[str, str], key: str, choices: tuple[str, ...]) -> str:
    text = own.get(key, "").strip().lower()
    if text and text not in choices:
        raise InvalidField(key, own[key], f"one of {', '.join(choices)}")
    return text


def _switch(own: Mapping[str, str], key: str) -> bool:
    text = own.get(key, "").strip().lower()
    if text not in ("", "true", "false"):
        raise InvalidField(key, own[key], "true or false")
    return text == "true"
