"""The free text of `mkfsOptions`: the one list of options that it may hold, and the values that each takes. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.parameters.values import InvalidParameter

OPTIONS = "mkfsOptions"
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
