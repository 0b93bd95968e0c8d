"""The arguments of mkfs: the driver's defaults, the keys of a StorageClass and its free text. Pure.

The controller decides it before a volume exists, and the node before it writes to a device; a volume that has a
filesystem is not judged. Defaults, keys and what each costs are in docs/mkfs.md. Sizes of keys are bytes.
"""

from __future__ import annotations

import itertools
import mmap
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from csi_driver.errors import InvalidField
from csi_driver.parameters import values as read
from csi_driver.parameters.values import InvalidParameter

FILESYSTEMS = ("ext4", "xfs", "btrfs")
"""Filesystems that the driver makes."""
BLOCK, INODE, BYTES_PER_INODE = "mkfs/blockSize", "mkfs/inodeSize", "mkfs/bytesPerInode"
OPTIONS = "mkfsOptions"
RESERVED, STRIPES, DISCARD = "mkfs/reservedBlocksPercent", "mkfs/stripeGeometry", "mkfs/discard"
MKFS_KEYS = {BLOCK, INODE, BYTES_PER_INODE, RESERVED, STRIPES, DISCARD}

LARGEST_PAGE_BYTES = 65536
"""For the controller, which does not know the pages of its nodes: no block can be larger."""
_SECTOR_BYTES = 4096
"""Volumes have no smaller sectors, and a filesystem no smaller blocks than its device's sectors."""
_DEFAULT_BLOCK_BYTES = 4096
_MOST_BLOCK_BYTES = 65536
_MOST_BYTES_PER_INODE = 64 << 20
_XFS_STRIPES_FROM_BYTES = 900 << 20
"""mkfs.xfs recalculates the log of a smaller filesystem when it gets stripes, finds it too small and fails."""
_SWITCH = re.compile("true|false")


def check_fs_type(field: str, fs_type: str, supported: Sequence[str] = FILESYSTEMS) -> None:
    """Refuse a filesystem that is not supported; an empty one leaves the choice to the driver."""
    if fs_type and fs_type not in supported:
        raise InvalidField(field, fs_type, f"one of {', '.join(supported)}")


def check_keys(own: Mapping[str, str]) -> None:
    """Check the keys by the bounds that hold for any filesystem: for requests that name none."""
    read.power_of_two(own, BLOCK, _SECTOR_BYTES, _MOST_BLOCK_BYTES)
    read.power_of_two(own, INODE, 128, _MOST_BLOCK_BYTES)
    read.number(own, BYTES_PER_INODE, _SECTOR_BYTES, _MOST_BYTES_PER_INODE)
    read.number(own, RESERVED, 0, 50)
    for key in (STRIPES, DISCARD):
        _switch(own, key)
    split_options(own.get(OPTIONS, ""))


def _switch(own: Mapping[str, str], key: str) -> bool | None:
    text = read.text(own, key, _SWITCH, "true or false")
    return None if text is None else text == "true"


@dataclass(frozen=True, slots=True)
class MkfsArguments:
    """Arguments of mkfs besides device and uuid: `every` one, and those that the StorageClass `asked` for."""

    every: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MkfsRequest:
    """The keys for mkfs in a volume context, and the volume's stripes and size; 0 = not known."""

    context: Mapping[str, str] = field(default_factory=dict)
    stripe_unit_bytes: int = 0
    stripe_bytes: int = 0
    size_bytes: int = 0
    page_bytes: int = mmap.PAGESIZE

    def arguments(self, fs_type: str) -> MkfsArguments:
        """Return the arguments of mkfs.`fs_type`. Raises `InvalidParameter` naming the key and the values it takes."""
        own = {key: value for key, value in self.context.items() if value}
        problems = read.Problems()
        free = problems.of(lambda: mkfs_arguments(own.get(OPTIONS, ""), fs_type)) or ()
        block_bytes = _block_bytes(own, free or own.get(OPTIONS, "").split(), fs_type)
        settings = _Settings(own, self, fs_type, block_bytes, problems)
        keyed = tuple(_KEYED[fs_type](settings)) if fs_type in _KEYED else ()
        striped = () if _has_stripes(free) else tuple(_STRIPED[fs_type](settings)) if fs_type in _STRIPED else ()
        defaults, discards = _defaults(fs_type, settings), _discards(fs_type, settings)
        settings.refuse_unused()
        _refuse_twice(keyed, free, fs_type, problems)
        problems.raise_any()
        every = _merged((*defaults, *striped, *keyed, *free))
        return MkfsArguments(every, _merged((*discards, *keyed, *free)))


class _Settings:
    """Reads the keys one by one for one filesystem; a key that is never read does not exist for it."""

    def __init__(
        self, own: Mapping[str, str], request: MkfsRequest, fs_type: str, block_bytes: int, problems: read.Problems
    ) -> None:
        self._own = own
        self._request = request
        self._fs_type = fs_type
        self._problems = problems
        self._read = {OPTIONS, STRIPES, DISCARD}
        self.block_bytes = block_bytes
        self.size_bytes = request.size_bytes

    def power_of_two(self, key: str, least: int, most: int) -> int | None:
        """Return a size within these bounds; None where the key is not set."""
        return self._number(read.power_of_two, key, least, most)

    def number(self, key: str, least: int, most: int) -> int | None:
        """Return a number within these bounds; None where the key is not set."""
        return self._number(read.number, key, least, most)

    def _number(
        self, reader: Callable[[Mapping[str, str], str, int, int, str], int | None], key: str, least: int, most: int
    ) -> int | None:
        self._read.add(key)
        return self._problems.of(lambda: reader(self._own, key, least, most, f" for {self._fs_type}"))

    def block(self) -> int | None:
        """Return the block size asked for, within what volume and kernel can do."""
        return self.power_of_two(BLOCK, _SECTOR_BYTES, min(_MOST_BLOCK_BYTES, self._request.page_bytes))

    def switch(self, key: str, *, default: bool) -> bool:
        """Return the value of a key that is true or false."""
        value = self._problems.of(lambda: _switch(self._own, key))
        return default if value is None else value

    def stripes(self) -> tuple[int, int] | None:
        """Return unit and width of the volume's stripes in bytes; None where mkfs gets none."""
        if not self.switch(STRIPES, default=True):
            return None
        unit, whole, block = self._request.stripe_unit_bytes, self._request.stripe_bytes, self.block_bytes
        is_whole = unit > 0 and unit % block == 0 and whole >= unit and whole % unit == 0
        return (unit, whole) if is_whole else None

    def refuse_unused(self) -> None:
        for key in sorted(self._own):
            if key.startswith("mkfs/") and key not in self._read:
                taken = ", ".join(sorted(self._read - {OPTIONS}))
                reason = f"{self._fs_type} has no such setting; it has {taken}"
                self._problems.add(read.RefusedParameter(key, reason))


# --- the filesystems ----------------------------------------------------------------------------------------


def _block_bytes(own: Mapping[str, str], free: Sequence[str], fs_type: str) -> int:
    """Return the block size that mkfs will use: the bounds of other settings depend on it."""
    text = own.get(BLOCK, "")
    if fs_type in ("ext4", "xfs") and re.fullmatch(r"[0-9]{4,6}", text):
        found = int(text)
    else:
        pairs = dict(itertools.pairwise(free))
        match = re.fullmatch(r"(?:size=)?([0-9]{1,6})(k?)", pairs.get("-b", ""), re.IGNORECASE)
        found = int(match[1]) * (1024 if match[2] else 1) if match else 0
    return found or _DEFAULT_BLOCK_BYTES


def _ext4(settings: _Settings) -> Iterator[str]:
    block = settings.block()
    if block is not None:
        yield from ("-b", str(block))
    inode = settings.power_of_two(INODE, 128, settings.block_bytes)
    if inode is not None:
        yield from ("-I", str(inode))
    # Fewer bytes than a block for each inode would make inodes that no file could ever use (mke2fs(8), -i).
    per_inode = settings.number(BYTES_PER_INODE, settings.block_bytes, _MOST_BYTES_PER_INODE)
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
    """Return the arguments that hold where the StorageClass asks for nothing else; docs/mkfs.md has the reasons."""
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


def _refuse_twice(keyed: Sequence[str], free: Sequence[str], fs_type: str, problems: read.Problems) -> None:
    """Refuse a setting that both a key and the free text make: which of them counts depends on the tool."""
    same = _SAME.get(fs_type, {})
    said = {same[name] for name in _names(keyed) if name in same}
    for name in _names(free):
        if same.get(name) in said:
            problems.add(InvalidParameter(OPTIONS, name, f"no option that the parameter {same[name]} sets as well"))


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
    """Join all `-E` into one, as mke2fs takes only the last; of discard and nodiscard the later counts.

    Other options may be repeated: mke2fs and mkfs.btrfs take the last, and mkfs.xfs never gets one twice.
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

_LONGEST_TEXT = 1024


@dataclass(frozen=True, slots=True)
class _Value:
    """The value of an option: the pattern that it matches, and `says`, which completes "expected for OPTION ..."."""

    pattern: str
    says: str


def _list_of(*names: str) -> _Value:
    """Return the value that is a comma-separated list of name or name=number, of these names alone."""
    one = rf"(?:{'|'.join(names)})(?:={_SIZE_PATTERN})?"
    return _Value(rf"{one}(?:,{one})*", f"{', '.join(names)} (separated by commas, as name=number)")


def _words_of(*names: str) -> _Value:
    return _Value("|".join(map(re.escape, names)), f"one of {', '.join(names)}")


_SIZE_PATTERN = r"[0-9]{1,12}[kKmMgGsb]?"
_FEATURE = r"(?!list-all)\^?[A-Za-z0-9_][A-Za-z0-9_-]*"
_LETTERS = r"[A-Za-z0-9_.-]"

_NUMBER = _Value(r"[0-9]{1,12}", "a number")
_SIZE = _Value(_SIZE_PATTERN, "a size, such as 16384 or 16k")
_FEATURES = _Value(rf"{_FEATURE}(?:,{_FEATURE})*", "names of features, separated by commas, ^ for without")
_BLOCKS = _Value(r"4096|8192|16384|32768|65536|(?:4|8|16|32|64)[kK]", "a power of two from 4096 to 65536")
_XFS_BLOCKS = _Value(rf"size=(?:{_BLOCKS.pattern})", f"size= with {_BLOCKS.says}")
_BTRFS_PROFILE = _words_of("single", "dup")

ALLOWED: Mapping[str, Mapping[str, _Value | None]] = {
    # mke2fs(8). Left out on purpose: assume_storage_prezeroed, which nobody can promise of reused space;
    # -F, -n, -S, -d, -l, -c, -z, -U, -M, -o, -r and what names another device.
    "ext4": {
        "-b": _words_of("4096", "8192", "16384", "32768", "65536"),
        "-C": _SIZE,
        "-D": None,
        "-e": _words_of("continue", "remount-ro"),
        "-E": _list_of(
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
        "-J": _list_of("size", "fast_commit_size"),
        "-K": None,
        "-L": _Value(_LETTERS + "{1,16}", "a label of at most 16 letters, digits, _, . and -"),
        "-m": _Value(r"[0-9]{1,2}(?:\.[0-9]{1,3})?", "a percentage, such as 1 or 0.5"),
        "-N": _NUMBER,
        "-O": _FEATURES,
        "-q": None,
        "-T": _Value(r"[a-z0-9]+(?:,[a-z0-9]+)*", "usage types of mke2fs.conf, separated by commas"),
    },
    # mkfs.xfs(8). Left out on purpose: -c, -f, -N, -p, -r and what names a file, a log device or a smaller size.
    "xfs": {
        "-b": _XFS_BLOCKS,
        "-d": _list_of("agcount", "agsize", "su", "sw", "sunit", "swidth", "noalign", "cowextsize", "extszinherit"),
        "-i": _list_of("size", "perblock", "maxpct", "align", "attr", "sparse", "nrext64", "exchange"),
        "-K": None,
        "-l": _list_of("size", "su", "sunit", "version", "lazy-count"),
        "-L": _Value(_LETTERS + "{1,12}", "a label of at most 12 letters, digits, _, . and -"),
        "-m": _list_of("crc", "finobt", "inobtcount", "reflink", "rmapbt", "bigtime", "metadir", "autofsck"),
        "-n": _list_of("size", "version", "ftype", "parent"),
        "-q": None,
        "-s": _XFS_BLOCKS,
    },
    # mkfs.btrfs(8). Left out on purpose: -b, -f, -r, -U, what takes a path, and `list-all`, which makes nothing.
    "btrfs": {
        "-d": _BTRFS_PROFILE,
        "-K": None,
        "-L": _Value(_LETTERS + "{1,64}", "a label of at most 64 letters, digits, _, . and -"),
        "-m": _BTRFS_PROFILE,
        "-M": None,
        "-n": _BLOCKS,
        "-O": _FEATURES,
        "-q": None,
        "-R": _FEATURES,
        "-s": _BLOCKS,
        "--csum": _words_of("crc32c", "xxhash", "sha256", "blake2"),
        "--data": _BTRFS_PROFILE,
        "--metadata": _BTRFS_PROFILE,
        "--mixed": None,
        "--nodesize": _BLOCKS,
        "--nodiscard": None,
        "--features": _FEATURES,
        "--sectorsize": _BLOCKS,
    },
}
"""Options that free text may hold, by filesystem, with their values; None = the option has no value."""


def mkfs_arguments(text: str, fs_type: str) -> tuple[str, ...]:
    """Split the free text and check each option and its value against `ALLOWED`.

    Raises `InvalidParameter` naming the option.
    """
    known = ALLOWED.get(fs_type, {})
    taken: list[str] = []
    rest = iter(split_options(text))
    for word in rest:
        flag, attached = _flag_and_value(word)
        if flag not in known:
            raise InvalidParameter(OPTIONS, word, f"options of mkfs.{fs_type} among {', '.join(known) or 'none'}")
        value_of = known[flag]
        if value_of is None:
            if attached is not None:
                raise InvalidParameter(OPTIONS, word, f"{flag} without a value")
            taken.append(flag)
            continue
        value = attached if attached is not None else next(rest, "")
        if re.fullmatch(value_of.pattern, value) is None:
            raise InvalidParameter(OPTIONS, f"{flag} {value}", f"{value_of.says} for {flag} of mkfs.{fs_type}")
        taken.extend([f"{flag}={value}"] if flag.startswith("--") else [flag, value])
    return tuple(taken)


def split_options(text: str) -> list[str]:
    """Split the free text as a shell splits it; what cannot be a list of options is refused for any filesystem."""
    expected = f"at most {_LONGEST_TEXT} printable ASCII characters that begin with an option"
    if len(text) > _LONGEST_TEXT or not text.isascii() or not text.isprintable():
        raise InvalidParameter(OPTIONS, text, expected)
    try:
        words = shlex.split(text)
    except ValueError as problem:
        raise InvalidParameter(OPTIONS, text, "options with closed quotes") from problem
    if words and not words[0].startswith("-"):
        raise InvalidParameter(OPTIONS, text, expected)
    return words


def _flag_and_value(word: str) -> tuple[str, str | None]:
    """Take `-m0`, `--csum=x` and `-m` apart into the option and the value in the same word, if any."""
    if word.startswith("--"):
        flag, has_value, value = word.partition("=")
        return flag, value if has_value else None
    return word[:2], word[2:] or None
