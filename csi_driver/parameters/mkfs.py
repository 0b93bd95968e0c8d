"""What mkfs is told: the driver's defaults, the StorageClass's keys, and its free text, checked and put together. Pure.

Everything is decided here, before any device is touched; defaults, keys and what each costs are in docs/mkfs.md. The
one list of options that free text may hold is here as well. Sizes of keys are bytes.
"""

from __future__ import annotations

import itertools
import mmap
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.errors import InvalidField

FILESYSTEMS = ("ext4", "xfs", "btrfs")
"""What the driver makes."""
OPTIONS = "mkfsOptions"
BLOCK, INODE, BYTES_PER_INODE = "mkfs/blockSize", "mkfs/inodeSize", "mkfs/bytesPerInode"
RESERVED, STRIPES, DISCARD = "mkfs/reservedBlocksPercent", "mkfs/stripeGeometry", "mkfs/discard"

_SECTOR_BYTES = 4096
"""Volumes have no smaller sectors, and a filesystem no smaller blocks than its device's sectors."""
_DEFAULT_BLOCK_BYTES = 4096
_MOST_BLOCK_BYTES = 65536
_XFS_STRIPES_FROM_BYTES = 900 << 20
"""Where mkfs.xfs is told of stripes, it divides the log of a small filesystem anew, finds it too small and gives up."""


def check_fs_type(field: str, fs_type: str) -> None:
    """Refuse a filesystem that the driver does not make; an empty one leaves the choice to the driver."""
    if fs_type and fs_type not in FILESYSTEMS:
        raise InvalidField(field, fs_type, f"one of {', '.join(FILESYSTEMS)}")


@dataclass(frozen=True, slots=True)
class MkfsArguments:
    """The whole of what mkfs is told besides device and uuid; `asked` is what of it the StorageClass wanted."""

    every: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MkfsRequest:
    """What the StorageClass says of mkfs (a volume's context), and the volume's stripes and size; 0 = not known."""

    context: Mapping[str, str] = field(default_factory=dict)
    stripe_unit_bytes: int = 0
    stripe_bytes: int = 0
    size_bytes: int = 0
    page_bytes: int = mmap.PAGESIZE

    def arguments(self, fs_type: str) -> MkfsArguments:
        """Put together what mkfs.`fs_type` is told. Raises `InvalidField` naming the key and what it may be."""
        free = mkfs_arguments(self.context.get(OPTIONS, ""), fs_type)
        settings = _Settings(self, fs_type, _block_bytes(self.context, free, fs_type))
        keyed = tuple(_KEYED[fs_type](settings)) if fs_type in _KEYED else ()
        settings.refuse_unused()
        _refuse_twice(keyed, free, fs_type)
        striped = () if _has_stripes(free) else tuple(_STRIPED[fs_type](settings)) if fs_type in _STRIPED else ()
        every = _merged((*_defaults(fs_type, settings), *striped, *keyed, *free))
        asked = _merged((*_discards(fs_type, settings), *keyed, *free))
        return MkfsArguments(every, asked)


class _Settings:
    """The keys, read one by one for one filesystem; what was not read by then does not exist for it."""

    def __init__(self, wish: MkfsRequest, fs_type: str, block_bytes: int) -> None:
        self._wish = wish
        self._fs_type = fs_type
        self._read = {OPTIONS, STRIPES, DISCARD}
        self.block_bytes = block_bytes
        self.size_bytes = wish.size_bytes

    def power_of_two(self, key: str, least: int, most: int) -> int | None:
        """Return a size within these bounds; None where the key is not set."""
        bounds = f"a power of two from {least} to {most}" if least < most else f"{most}, here the only one possible"
        wanted = f"{bounds}, for {self._fs_type}"
        value = self._number(key, least, most, wanted)
        if value is not None and value & (value - 1):
            raise InvalidField(key, str(value), wanted)
        return value

    def number(self, key: str, least: int, most: int) -> int | None:
        """Return a number within these bounds; None where the key is not set."""
        return self._number(key, least, most, f"a number from {least} to {most} for {self._fs_type}")

    def _number(self, key: str, least: int, most: int, wanted: str) -> int | None:
        self._read.add(key)
        text = self._wish.context.get(key, "")
        if not text:
            return None
        value = int(text) if re.fullmatch(r"[0-9]{1,12}", text) else -1
        if not least <= value <= most:
            raise InvalidField(key, text, wanted)
        return value

    def block(self) -> int | None:
        """Return the block size asked for, within what volume and kernel can do."""
        return self.power_of_two(BLOCK, _SECTOR_BYTES, min(_MOST_BLOCK_BYTES, self._wish.page_bytes))

    def switch(self, key: str, *, default: bool) -> bool:
        """Return what a key says that is true or false."""
        text = self._wish.context.get(key, "")
        if text not in ("", "true", "false"):
            raise InvalidField(key, text, "true or false")
        return text == "true" if text else default

    def stripes(self) -> tuple[int, int] | None:
        """Return unit and width of the volume's stripes in bytes; None where there are none to be told of."""
        if not self.switch(STRIPES, default=True):
            return None
        unit, whole, block = self._wish.stripe_unit_bytes, self._wish.stripe_bytes, self.block_bytes
        is_whole = unit > 0 and unit % block == 0 and whole >= unit and whole % unit == 0
        return (unit, whole) if is_whole else None

    def refuse_unused(self) -> None:
        for key in self._wish.context:
            if key.startswith("mkfs/") and key not in self._read:
                taken = ", ".join(sorted(self._read - {OPTIONS}))
                raise InvalidField(key, self._wish.context[key], f"a key that {self._fs_type} has, such as {taken}")


# --- the filesystems ----------------------------------------------------------------------------------------


def _block_bytes(context: Mapping[str, str], free: Sequence[str], fs_type: str) -> int:
    """Return the block size that mkfs will use: the bounds of other settings depend on it."""
    text = context.get(BLOCK, "")
    if fs_type in ("ext4", "xfs") and re.fullmatch(r"[0-9]{4,6}", text):
        return int(text)
    pairs = dict(itertools.pairwise(free))
    found = re.fullmatch(r"(?:size=)?([0-9]{4,6})(k?)", pairs.get("-b", ""), re.IGNORECASE)
    return int(found[1]) * (1024 if found[2] else 1) if found else _DEFAULT_BLOCK_BYTES


def _ext4(settings: _Settings) -> Iterator[str]:
    block = settings.block()
    if block is not None:
        yield from ("-b", str(block))
    inode = settings.power_of_two(INODE, 128, settings.block_bytes)
    if inode is not None:
        yield from ("-I", str(inode))
    # Fewer bytes than a block for each inode would make inodes that no file could ever use (mke2fs(8), -i).
    per_inode = settings.number(BYTES_PER_INODE, settings.block_bytes, 64 << 20)
    if per_inode is not None:
        yield from ("-i", str(per_inode))
    reserved = settings.number(RESERVED, 0, 50)
    if reserved is not None:
        yield from ("-m", str(reserved))


def _xfs(settings: _Settings) -> Iterator[str]:
    block = settings.block()
    if block is not None:
        yield from ("-b", f"size={block}")
    # At least two inodes to a block; with checksums none below 512 bytes (mkfs.xfs(8), -i size).
    inode = settings.power_of_two(INODE, 512, min(2048, settings.block_bytes // 2))
    if inode is not None:
        yield from ("-i", f"size={inode}")


def _btrfs(settings: _Settings) -> Iterator[str]:
    # Its blocks are the machine's pages; what can be chosen are the nodes of its trees (mkfs.btrfs(8), -n).
    node = settings.power_of_two(BLOCK, _SECTOR_BYTES, _MOST_BLOCK_BYTES)
    if node is not None:
        yield from ("-n", str(node))


def _ext4_stripes(settings: _Settings) -> Iterator[str]:
    found = settings.stripes()
    if found is not None:
        unit, whole = (size // settings.block_bytes for size in found)
        yield from ("-E", f"stride={unit},stripe_width={whole}")


def _xfs_stripes(settings: _Settings) -> Iterator[str]:
    found = settings.stripes()
    if found is not None and settings.size_bytes >= _XFS_STRIPES_FROM_BYTES:
        yield from ("-d", f"su={found[0]},sw={found[1] // found[0]}")


def _no_stripes(settings: _Settings) -> Iterator[str]:
    settings.stripes()
    return iter(())


_KEYED: Mapping[str, Callable[[_Settings], Iterator[str]]] = {"ext4": _ext4, "xfs": _xfs, "btrfs": _btrfs}
_STRIPED: Mapping[str, Callable[[_Settings], Iterator[str]]] = {
    "ext4": _ext4_stripes, "xfs": _xfs_stripes, "btrfs": _no_stripes,
}  # fmt: skip


def _defaults(fs_type: str, settings: _Settings) -> tuple[str, ...]:
    """Return what is told where nothing else is asked for; the reasons are in docs/mkfs.md."""
    discard = settings.switch(DISCARD, default=False)
    if fs_type == "ext4":
        word = "discard" if discard else "nodiscard"
        return ("-m", "0", "-E", f"{word},lazy_itable_init=1,lazy_journal_init=1")
    return () if discard else ("-K",)


def _discards(fs_type: str, settings: _Settings) -> tuple[str, ...]:
    asked = fs_type == "ext4" and settings.switch(DISCARD, default=False)
    return ("-E", "discard") if asked else ()


def _has_stripes(free: Sequence[str]) -> bool:
    names = {setting.partition("=")[0] for word in free for setting in word.split(",")}
    return bool(names & {"stride", "stripe_width", "stripe-width", "su", "sw", "sunit", "swidth", "noalign"})


_SAME: Mapping[str, Mapping[str, str]] = {
    "ext4": {"-b": BLOCK, "-I": INODE, "-i": BYTES_PER_INODE, "-m": RESERVED},
    "xfs": {"-b size": BLOCK, "-i size": INODE},
    "btrfs": {"-n": BLOCK, "--nodesize": BLOCK},
}


def _refuse_twice(keyed: Sequence[str], free: Sequence[str], fs_type: str) -> None:
    """Refuse what both a key and the free text say: which of them counts would be mkfs's secret."""
    same = _SAME.get(fs_type, {})
    said = {same[name] for name in _names(keyed) if name in same}
    for name in _names(free):
        if same.get(name) in said:
            raise InvalidField(OPTIONS, name, f"no option that {same[name]} sets as well")


def _names(words: Sequence[str]) -> Iterator[str]:
    """Yield the names of options, alone and with those of the settings in their values."""
    flag = ""
    for word in words:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            yield flag
        else:
            yield from (f"{flag} {setting.partition('=')[0]}" for setting in word.split(","))


def _merged(words: Sequence[str]) -> tuple[str, ...]:
    """Join all `-E` into one, as mke2fs heeds only the last; of what excludes one another the later counts.

    Other options may be said again: mke2fs and mkfs.btrfs take the last, and mkfs.xfs is never told one twice.
    """
    extended: dict[str, str] = {}
    rest: list[str] = []
    flag = ""
    for word in words:
        if flag == "-E":
            for setting in word.split(","):
                name = setting.partition("=")[0].replace("-", "_")
                extended.pop("discard" if name == "nodiscard" else "nodiscard" if name == "discard" else "", None)
                extended[name] = setting
        elif word != "-E" and not (word == "-K" and "-K" in rest):
            rest.append(word)
        flag = "" if flag == "-E" else word
    return (*rest, *(("-E", ",".join(extended.values())) if extended else ()))


# --- free text ----------------------------------------------------------------------------------------------

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
        raise InvalidField(OPTIONS, text, f"words as a shell splits them ({error})") from error
    known = _MKFS.get(fs_type, {})
    taken: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, attached = _flag_and_value(word)
        if flag not in known:
            raise InvalidField(OPTIONS, word, f"options of mkfs.{fs_type} among {', '.join(known) or 'none'}")
        shape = known[flag]
        if shape is None:
            if attached is not None:
                raise InvalidField(OPTIONS, word, f"{flag} without a value")
            taken.append(flag)
            continue
        value = attached if attached is not None else next(rest, "")
        if re.fullmatch(shape, value) is None:
            raise InvalidField(OPTIONS, f"{flag} {value}", f"a value of {flag} that mkfs.{fs_type} may be given")
        taken.extend([f"{flag}={value}"] if flag.startswith("--") else [flag, value])
    return tuple(taken)


def _flag_and_value(word: str) -> tuple[str, str | None]:
    """Take `-m0`, `--csum=x` and `-m` apart into the option and the value in the same word, if any."""
    if word.startswith("--"):
        flag, has_value, value = word.partition("=")
        return flag, value if has_value else None
    return word[:2], word[2:] or None
