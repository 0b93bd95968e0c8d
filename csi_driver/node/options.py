"""Mount options and mkfs options as callers write them: what is taken, what is refused, what follows from the access.

The one list of options that are refused is here. What passes it and is unknown to the filesystem is refused by the
kernel when it mounts. Values may be sensitive (CSI marks mount_flags so): messages show an option's name alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from csi_driver.errors import InvalidField
from csi_driver.machine import Mounted
from csi_driver.model import AccessMode, MountAccess
from csi_driver.node.content import Wish

MOUNT_FLAGS = "volume_capability.mount.mount_flags"
FS_TYPE = "fsType"
MKFS_OPTIONS = "mkfsOptions"

_SHAPE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*(?:=[A-Za-z0-9_.:+-]+)?")
_SELINUX = re.compile(r'(context|fscontext|defcontext|rootcontext)=("?)([A-Za-z0-9_.:,-]+)\2')
_ROOT_MODE = re.compile(r"nvmesh:(?:chmod|permissions)=([0-7]{3,4})")

_MEANINGLESS = frozenset({"defaults", "_netdev", "nofail", "rw"})
"""Taken and dropped: mount(8) keeps them for itself (fstab), the kernel does not know them."""

_REFUSED = {
    "another operation than mounting the volume": (
        "bind rbind remount move loop offset sizelimit shared rshared slave rslave private rprivate unbindable "
        "runbindable user users owner group auto noauto helper uhelper"
    ),
    "another device or place on disk": (
        "device logdev rtdev journal_path journal_dev journal sb subvol subvolid usrjquota grpjquota"
    ),
    "harmful to the machine or to data": (
        "abort debug dev suid test_dummy_encryption data_err clear_cache skip_balance check_int check_int_data"
    ),
}
_REFUSED_BY_NAME = {name: reason for reason, names in _REFUSED.items() for name in names.split()}
_REFUSED_WHOLE = {"errors=panic": "harmful to the machine or to data"}
_NO_REPLAY = frozenset({"noload", "norecovery", "nologreplay", "rescue"})
"""Leave the journal unread: right for a reader, destructive for a writer."""

_ALWAYS = {"xfs": ("nouuid",)}
"""Clones of a volume carry its uuid, and xfs refuses the second of one uuid on a node (xfs(5), nouuid)."""

_WHEN_READ_ONLY = {
    "ext4": ("noload",),
    "xfs": ("norecovery",),
    # Replays nothing even where the device itself could be written (btrfs(5), rescue).
    "btrfs": ("rescue=nologreplay",),
}


@dataclass(frozen=True, slots=True)
class MountPlan:
    """What a request for mount access comes to. `root_mode`: mode of the root directory, None = leave it."""

    wish: Wish
    flags: tuple[str, ...]
    root_mode: int | None
    mkfs_options: tuple[str, ...]

    @property
    def read_only(self) -> bool:
        return self.wish.read_only

    def options_for(self, fs_type: str) -> tuple[str, ...]:
        """Return the options to mount a filesystem of that type with, each once."""
        implied = _ALWAYS.get(fs_type, ()) + (_WHEN_READ_ONLY.get(fs_type, ()) if self.read_only else ())
        return tuple(dict.fromkeys((*self.flags, *implied)))


def plan_mount(
    access: MountAccess,
    mode: AccessMode,
    *,
    read_only: bool,
    mkfs_options: str,
    supported: Sequence[str],
    fs_type_of_class: str = "",
) -> MountPlan:
    """Check everything a caller may ask of a filesystem, before any device is touched. Raises `InvalidField`.

    `read_only`: it is so whatever the mode and the flags say. `fs_type_of_class` is the StorageClass's own, which
    counts where the capability names none (the parameter `fsType` of older drivers).
    """
    if mode in (AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_SINGLE_WRITER):
        raise InvalidField(
            "volume_capability.access_mode", mode.value, "a mode that writes on one node: filesystems are not shared"
        )
    fs_type = access.fs_type or fs_type_of_class
    if fs_type and fs_type not in supported:
        raise InvalidField("volume_capability.mount.fs_type", fs_type, f"one of {', '.join(supported)}")
    flags, root_mode = mount_flags(access.mount_flags)
    readers = read_only or mode.is_read_only or "ro" in flags
    if readers and "rw" in access.mount_flags:
        raise InvalidField(MOUNT_FLAGS, "rw", "no such option with read-only access")
    kept = tuple(flag for flag in flags if flag != "ro")
    if not readers:
        for flag in kept:
            if _name(flag) in _NO_REPLAY:
                raise InvalidField(MOUNT_FLAGS, _name(flag), "no option that leaves the journal unread while writing")
    wish = Wish(fs_type, readers)
    return MountPlan(wish, kept, None if readers else root_mode, mkfs_arguments(mkfs_options, wish.to_make))


def mount_flags(flags: Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Take mount flags apart into kernel options and the mode asked for the root directory."""
    taken: dict[str, None] = {}
    root_mode: int | None = None
    for option in _split(flags):
        mode = _ROOT_MODE.fullmatch(option)
        if mode is not None:
            root_mode = int(mode[1], 8)
            continue
        selinux = _SELINUX.fullmatch(option)
        if selinux is not None:
            taken[f"{selinux[1]}={selinux[3]}"] = None
            continue
        name = _name(option)
        if _SHAPE.fullmatch(option) is None or name.startswith("x-"):
            raise InvalidField(MOUNT_FLAGS, name, "an option of the filesystem, such as noatime or commit=30")
        reason = _REFUSED_WHOLE.get(option) or _REFUSED_BY_NAME.get(name)
        if reason is not None:
            raise InvalidField(MOUNT_FLAGS, name, f"no option that is {reason}")
        if option not in _MEANINGLESS:
            taken[option] = None
    return tuple(taken), root_mode


def _split(flags: Sequence[str]) -> list[str]:
    """Split flags at commas, as mount(8) would, but for SELinux contexts, whose levels hold commas themselves."""
    options: list[str] = []
    for flag in flags:
        options.extend([flag] if _SELINUX.fullmatch(flag) else flag.split(","))
    return options


def _name(option: str) -> str:
    return option.partition("=")[0]


# --- comparing with what the kernel shows -------------------------------------------------------------------

_ALWAYS_SHOWN = frozenset({"nosuid", "nodev", "noexec", "noatime", "nodiratime", "sync", "dirsync", "lazytime"})
"""Options that /proc/self/mountinfo shows exactly when they are set (fs/proc_namespace.c)."""


def differences(mounted: Mounted, plan: MountPlan) -> list[str]:
    """Return how a mount differs from the plan, each as "is X, wanted Y"; empty = it is what is wanted.

    Only what the kernel is known to show counts: it leaves out defaults and respells values, and a mount that is
    right must never be called wrong.
    """
    found: list[str] = []
    if plan.wish.fs_type and mounted.fs_type != plan.wish.fs_type:
        found.append(f"filesystem is {mounted.fs_type}, wanted {plan.wish.fs_type}")
    if mounted.read_only != plan.read_only:
        found.append(f"access is {_access(mounted.read_only)}, wanted {_access(plan.read_only)}")
    wanted = frozenset(plan.options_for(mounted.fs_type))
    for option in sorted(_ALWAYS_SHOWN & (mounted.options ^ wanted)):
        present = option in mounted.options
        found.append(f"option {option} is {'set' if present else 'not set'}, wanted {'not set' if present else 'set'}")
    return found + _differing_values(mounted.options, wanted)


def _differing_values(shown: Collection[str], wanted: Collection[str]) -> list[str]:
    values = dict(option.split("=", 1) for option in shown if "=" in option)
    found: list[str] = []
    for option in sorted(wanted):
        name, has_value, value = option.partition("=")
        # Only plain numbers are spelled alike by everybody.
        if has_value and value.isdigit() and values.get(name, value).isdigit() and values.get(name, value) != value:
            found.append(f"option {name} is {values[name]}, wanted {value}")
    return found


def _access(read_only: bool) -> str:
    return "read-only" if read_only else "read-write"


# --- mkfs ---------------------------------------------------------------------------------------------------

_NUMBER = r"[0-9]{1,12}"
_SIZE = r"[0-9]{1,12}[kKmMgGsb]?"
_FEATURES = r"[\^A-Za-z0-9_]+(?:,[\^A-Za-z0-9_]+)*"


def _settings(*names: str) -> str:
    """Return the expression for a comma-separated list of name or name=number, of these names alone."""
    one = rf"(?:{'|'.join(names)})(?:={_SIZE})?"
    return rf"{one}(?:,{one})*"


_MKFS: dict[str, dict[str, str | None]] = {
    # mke2fs(8). Left out on purpose: assume_storage_prezeroed, which nobody can promise of reused space;
    # -F, -n, -S, -d, -l, -c, -z, -U, -M, -o, -r and what names another device.
    "ext4": {
        "-b": r"(?:1024|2048|4096)",
        "-C": _SIZE,
        "-D": None,
        "-e": r"(?:continue|remount-ro)",
        "-E": _settings(
            "stride",
            "stripe_width",
            "stripe-width",
            "lazy_itable_init",
            "lazy_journal_init",
            "discard",
            "nodiscard",
            "packed_meta_blocks",
            "num_backup_sb",
        ),
        "-g": _NUMBER,
        "-G": _NUMBER,
        "-i": _NUMBER,
        "-I": _NUMBER,
        "-J": _settings("size", "fast_commit_size"),
        "-K": None,
        "-L": r"[A-Za-z0-9_.-]{1,16}",
        "-m": r"[0-9]{1,2}(?:\.[0-9]{1,3})?",
        "-N": _NUMBER,
        "-O": _FEATURES,
        "-q": None,
        "-T": r"[a-z0-9]+(?:,[a-z0-9]+)*",
    },
    # mkfs.xfs(8). Left out on purpose: -c, -f, -N, -p, -r and what names a file, a log device or a smaller size.
    "xfs": {
        "-b": _settings("size"),
        "-d": _settings("agcount", "agsize", "su", "sw", "sunit", "swidth", "noalign", "cowextsize", "extszinherit"),
        "-i": _settings("size", "perblock", "maxpct", "align", "attr", "sparse", "nrext64", "exchange"),
        "-K": None,
        "-l": _settings("size", "su", "sunit", "version", "lazy-count"),
        "-L": r"[A-Za-z0-9_.-]{1,12}",
        "-m": _settings("crc", "finobt", "inobtcount", "reflink", "rmapbt", "bigtime", "metadir", "autofsck"),
        "-n": _settings("size", "version", "ftype", "parent"),
        "-q": None,
        "-s": _settings("size"),
    },
    # mkfs.btrfs(8). Left out on purpose: -b, -f, -r, -U and what takes a path.
    "btrfs": {
        "-d": r"(?:single|dup)",
        "-K": None,
        "-L": r"[A-Za-z0-9_.-]{1,64}",
        "-m": r"(?:single|dup)",
        "-M": None,
        "-n": _SIZE,
        "-O": _FEATURES,
        "-q": None,
        "-R": _FEATURES,
        "-s": _SIZE,
        "--csum": r"(?:crc32c|xxhash|sha256|blake2)",
        "--data": r"(?:single|dup)",
        "--metadata": r"(?:single|dup)",
        "--mixed": None,
        "--nodesize": _SIZE,
        "--nodiscard": None,
        "--features": _FEATURES,
        "--sectorsize": _SIZE,
    },
}


def mkfs_arguments(text: str, fs_type: str) -> tuple[str, ...]:
    """Split and check options for mkfs; each must be on the list of its filesystem, with a value of the right shape.

    Raises `InvalidField` naming the option.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise InvalidField(MKFS_OPTIONS, text, f"words as a shell splits them ({error})") from error
    known = _MKFS.get(fs_type, {})
    taken: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, attached = _flag_and_value(word)
        if flag not in known:
            raise InvalidField(MKFS_OPTIONS, word, f"options of mkfs.{fs_type} among {', '.join(known) or 'none'}")
        shape = known[flag]
        if shape is None:
            if attached is not None:
                raise InvalidField(MKFS_OPTIONS, word, f"{flag} without a value")
            taken.append(flag)
            continue
        value = attached if attached is not None else next(rest, "")
        if re.fullmatch(shape, value) is None:
            raise InvalidField(MKFS_OPTIONS, f"{flag} {value}", f"a value of {flag} that mkfs.{fs_type} may be given")
        taken.extend([f"{flag}={value}"] if flag.startswith("--") else [flag, value])
    return tuple(taken)


def _flag_and_value(word: str) -> tuple[str, str | None]:
    """Take `-m0`, `--csum=x` and `-m` apart into the option and the value in the same word, if any."""
    if word.startswith("--"):
        flag, has_value, value = word.partition("=")
        return flag, value if has_value else None
    return word[:2], word[2:] or None
