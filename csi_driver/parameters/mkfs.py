# SPDX-License-Identifier: Apache-2.0
"""The arguments of mkfs: defaults, keys of a StorageClass, free text of `mkfsOptions` (docs/mkfs.md). Sizes in bytes.

The controller checks them before a volume exists, the node before it formats a device.
"""

from __future__ import annotations

import itertools
import mmap
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from csi_driver.errors import InvalidField, InvalidRequest
from csi_driver.parameters import values as read
from csi_driver.parameters.values import InvalidParameter

FILESYSTEMS = ("ext4", "xfs", "btrfs")
BLOCK, INODE, BYTES_PER_INODE = "mkfs/blockSize", "mkfs/inodeSize", "mkfs/bytesPerInode"
RESERVED, STRIPES, DISCARD = "mkfs/reservedBlocksPercent", "mkfs/stripeGeometry", "mkfs/discard"
OPTIONS = "mkfsOptions"
MKFS_KEYS = {BLOCK, INODE, BYTES_PER_INODE, RESERVED, STRIPES, DISCARD}

LARGEST_PAGE_BYTES = 65536
"""For the controller, which does not know the page size of its nodes: no block can be larger."""
_SECTOR_BYTES = _DEFAULT_BLOCK_BYTES = 4096
"""Volumes have no smaller sectors, and a filesystem has no smaller blocks than the sectors of its device."""
_MOST_BLOCK_BYTES = 65536
_MOST_BYTES_PER_INODE = 64 << 20
_XFS_STRIPES_FROM_BYTES = 900 << 20
"""mkfs.xfs recalculates the log of a smaller filesystem when it gets stripes, finds it too small and fails."""
_MOST_TEXT = 1024
_STRIPE_SETTINGS = frozenset(["stride", "stripe_width", "stripe-width", "su", "sw", "sunit", "swidth", "noalign"])


def check_fs_type(field: str, fs_type: str, supported: Sequence[str] = FILESYSTEMS) -> None:
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
    text = read.text(own, key, re.compile("true|false"), "true or false")
    return None if text is None else text == "true"


@dataclass(frozen=True, slots=True)
class MkfsArguments:
    """Arguments of mkfs without device and uuid: `every` one, and those that the StorageClass `asked` for."""

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
        own = {key: value for key, value in self.context.items() if value}
        problems = read.Problems()
        text = own.get(OPTIONS, "")
        free = problems.of(lambda: mkfs_arguments(text, fs_type)) or ()
        block_bytes = _block_bytes(own, free or text.split(), fs_type)
        keyed = tuple(self._keyed(own, fs_type, block_bytes, problems))
        has_stripes = any(name.rpartition(" ")[2] in _STRIPE_SETTINGS for name in _names(free))
        wants_stripes = not has_stripes and problems.of(lambda: _switch(own, STRIPES)) is not False
        striped = self._striped(fs_type, block_bytes) if wants_stripes else ()
        discard = problems.of(lambda: _switch(own, DISCARD)) or False
        known = {STRIPES, DISCARD, *(key.name for key in _KEYS.get(fs_type, ()))}
        for key in sorted(key for key in own.keys() - known if key.startswith("mkfs/")):
            has = f"{fs_type} has no such setting; it has {', '.join(sorted(known))}"
            problems.add(InvalidRequest(f"parameter {key} cannot be used: {has}"))
        _refuse_twice(keyed, free, fs_type, problems)
        problems.raise_any()
        # docs/mkfs.md has the reasons of the defaults.
        defaults: tuple[str, ...] = () if discard else ("-K",)
        if fs_type == "ext4":
            word = "discard" if discard else "nodiscard"
            defaults = ("-m", "0", "-E", f"{word},lazy_itable_init=1,lazy_journal_init=1")
        asked = ("-E", "discard") if discard and fs_type == "ext4" else ()
        return MkfsArguments(_merged((*defaults, *striped, *keyed, *free)), _merged((*asked, *keyed, *free)))

    def _keyed(self, own: Mapping[str, str], fs_type: str, block_bytes: int, problems: read.Problems) -> Iterator[str]:
        for key in _KEYS.get(fs_type, ()):
            least, most = key.bounds(block_bytes, self.page_bytes)
            value = problems.of(partial(key.read, own, key.name, least, most, f" for {fs_type}"))
            if value is not None:
                flag, has_setting, setting = key.option.partition(" ")
                yield from (flag, f"{setting}={value}" if has_setting else str(value))

    def _striped(self, fs_type: str, block_bytes: int) -> tuple[str, ...]:
        unit, stripe = self.stripe_unit_bytes, self.stripe_bytes
        if unit <= 0 or unit % block_bytes or stripe < unit or stripe % unit:
            return ()
        if fs_type == "ext4":
            return ("-E", f"stride={unit // block_bytes},stripe_width={stripe // block_bytes}")
        if fs_type == "xfs" and self.size_bytes >= _XFS_STRIPES_FROM_BYTES:
            return ("-d", f"su={unit},sw={stripe // unit}")
        return ()


@dataclass(frozen=True, slots=True)
class _Key:
    """A key of one filesystem: the option, or option and setting, of mkfs, and the bounds by block and page size."""

    name: str
    option: str
    bounds: Callable[[int, int], tuple[int, int]]
    read: Callable[[Mapping[str, str], str, int, int, str], int | None] = read.power_of_two


def _block_bounds(block_bytes: int, page_bytes: int) -> tuple[int, int]:
    return _SECTOR_BYTES, min(_MOST_BLOCK_BYTES, page_bytes)


_KEYS: Mapping[str, Sequence[_Key]] = {
    "ext4": (
        _Key(BLOCK, "-b", _block_bounds),
        _Key(INODE, "-I", lambda block, _: (128, block)),
        # Fewer bytes than a block for each inode would make inodes that no file could ever use (mke2fs(8), -i).
        _Key(BYTES_PER_INODE, "-i", lambda block, _: (block, _MOST_BYTES_PER_INODE), read.number),
        _Key(RESERVED, "-m", lambda *_: (0, 50), read.number),
    ),
    "xfs": (
        _Key(BLOCK, "-b size", _block_bounds),
        # At least two inodes to a block; with checksums none below 512 bytes (mkfs.xfs(8), -i size).
        _Key(INODE, "-i size", lambda block, _: (512, min(2048, block // 2))),
    ),
    # Its blocks are the machine's pages; the size of its tree nodes can be chosen (mkfs.btrfs(8), -n).
    "btrfs": (_Key(BLOCK, "-n", lambda *_: (_SECTOR_BYTES, _MOST_BLOCK_BYTES)),),
}


def _block_bytes(own: Mapping[str, str], free: Sequence[str], fs_type: str) -> int:
    text = own.get(BLOCK, "")
    if fs_type in ("ext4", "xfs") and re.fullmatch(r"[0-9]{4,6}", text):
        return int(text) or _DEFAULT_BLOCK_BYTES
    option = dict(itertools.pairwise(free)).get("-b", "")
    match = re.fullmatch(r"(?:size=)?([0-9]{1,6})(k?)", option, re.IGNORECASE)
    return (int(match[1]) * (1024 if match[2] else 1) if match else 0) or _DEFAULT_BLOCK_BYTES


def _refuse_twice(keyed: Sequence[str], free: Sequence[str], fs_type: str, problems: read.Problems) -> None:
    """Refuse a setting that both a key and the free text make: which of them counts depends on the tool."""
    keys = {key.option: key.name for key in _KEYS.get(fs_type, ())} | (
        {"--nodesize": BLOCK} if fs_type == "btrfs" else {}
    )
    used = {keys[name] for name in _names(keyed) if name in keys}
    for name in _names(free):
        if keys.get(name) in used:
            problems.add(InvalidParameter(OPTIONS, name, f"no option that the parameter {keys[name]} sets as well"))


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
    """Join all `-E` into one, as mke2fs takes only the last; of discard and nodiscard the later counts."""
    extended: dict[str, str] = {}
    rest: list[str] = []
    flag = ""
    for word in words:
        if flag == "-E":
            for setting in word.split(","):
                name = setting.partition("=")[0].replace("-", "_")
                extended.pop({"nodiscard": "discard", "discard": "nodiscard"}.get(name, ""), None)
                extended[name] = setting
        elif word != "-E" and not (word == "-K" and "-K" in rest):
            rest.append(word)
        flag = "" if flag == "-E" else word
    return (*rest, *(("-E", ",".join(extended.values())) if extended else ()))


@dataclass(frozen=True, slots=True)
class _Value:
    """The value of an option: the pattern that it matches, and `says`, which completes "expected for OPTION ..."."""

    pattern: str
    says: str


def _list_of(names: str) -> _Value:
    one = rf"(?:{'|'.join(names.split())})(?:={_SIZE_PATTERN})?"
    return _Value(rf"{one}(?:,{one})*", f"{', '.join(names.split())} (separated by commas, as name=number)")


def _words_of(words: str) -> _Value:
    return _Value("|".join(map(re.escape, words.split())), f"one of {', '.join(words.split())}")


def _label_of(most: int) -> _Value:
    return _Value(rf"[A-Za-z0-9_.-]{{1,{most}}}", f"a label of at most {most} letters, digits, _, . and -")


_SIZE_PATTERN = r"[0-9]{1,12}[kKmMgGsb]?"
_FEATURE = r"(?!list-all)\^?[A-Za-z0-9_][A-Za-z0-9_-]*"
_NUMBER = _Value(r"[0-9]{1,12}", "a number")
_SIZE = _Value(_SIZE_PATTERN, "a size, such as 16384 or 16k")
_PERCENT = _Value(r"[0-9]{1,2}(?:\.[0-9]{1,3})?", "a percentage, such as 1 or 0.5")
_USAGES = _Value(r"[a-z0-9]+(?:,[a-z0-9]+)*", "usage types of mke2fs.conf, separated by commas")
_FEATURES = _Value(rf"{_FEATURE}(?:,{_FEATURE})*", "names of features, separated by commas, ^ for without")
_BLOCKS = _Value(r"4096|8192|16384|32768|65536|(?:4|8|16|32|64)[kK]", "a power of two from 4096 to 65536")
_XFS_BLOCKS = _Value(rf"size=(?:{_BLOCKS.pattern})", f"size= with {_BLOCKS.says}")
_PROFILE = _words_of("single dup")

ALLOWED: Mapping[str, Mapping[str, _Value | None]] = {
    # mke2fs(8). Left out on purpose: assume_storage_prezeroed, which is wrong for reused space;
    # -F, -n, -S, -d, -l, -c, -z, -U, -M, -o, -r and what names another device.
    "ext4": {
        "-b": _words_of("4096 8192 16384 32768 65536"), "-C": _SIZE, "-D": None, "-e": _words_of("continue remount-ro"),
        "-E": _list_of("stride stripe_width stripe-width lazy_itable_init lazy_journal_init discard nodiscard"
                       " packed_meta_blocks num_backup_sb"),
        "-g": _NUMBER, "-G": _NUMBER, "-i": _NUMBER, "-I": _NUMBER, "-J": _list_of("size fast_commit_size"), "-K": None,
        "-L": _label_of(16), "-m": _PERCENT, "-N": _NUMBER, "-O": _FEATURES, "-q": None, "-T": _USAGES,
    },
    # mkfs.xfs(8). Left out on purpose: -c, -f, -N, -p, -r and what names a file, a log device or a smaller size.
    "xfs": {
        "-b": _XFS_BLOCKS, "-d": _list_of("agcount agsize su sw sunit swidth noalign cowextsize extszinherit"),
        "-i": _list_of("size perblock maxpct align attr sparse nrext64 exchange"), "-K": None,
        "-l": _list_of("size su sunit version lazy-count"), "-L": _label_of(12),
        "-m": _list_of("crc finobt inobtcount reflink rmapbt bigtime metadir autofsck"),
        "-n": _list_of("size version ftype parent"), "-q": None, "-s": _XFS_BLOCKS,
    },
    # mkfs.btrfs(8). Left out on purpose: -b, -f, -r, -U, what takes a path, and `list-all`, which makes nothing.
    "btrfs": {
        "-d": _PROFILE, "-K": None, "-L": _label_of(64), "-m": _PROFILE, "-M": None, "-n": _BLOCKS, "-O": _FEATURES,
        "-q": None, "-R": _FEATURES, "-s": _BLOCKS, "--csum": _words_of("crc32c xxhash sha256 blake2"),
        "--data": _PROFILE, "--metadata": _PROFILE, "--mixed": None, "--nodesize": _BLOCKS, "--nodiscard": None,
        "--features": _FEATURES, "--sectorsize": _BLOCKS,
    },
}  # fmt: skip
"""Options that free text may hold, by filesystem, with their values; None = the option has no value."""


def mkfs_arguments(text: str, fs_type: str) -> tuple[str, ...]:
    """Check options and values of the free text against `ALLOWED`. Raises `InvalidParameter` naming the option."""
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
    expected = f"at most {_MOST_TEXT} printable ASCII characters that begin with an option"
    if len(text) > _MOST_TEXT or not text.isascii() or not text.isprintable():
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
