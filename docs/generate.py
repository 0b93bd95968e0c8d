"""Write the tables of docs/parameters.md that follow from the program's own: its flags, and the chart's values.

Usage: python docs/generate.py

What stands between `<!-- table: NAME -->` and `<!-- end of table -->` is written here, the rest by hand. The words are
the program's and values.yaml's own, so that each thing is said in one place.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "parameters.md"
sys.path.insert(0, str(ROOT))

from csi_driver.config.commands import COMMANDS, definition  # noqa: E402  # found by the line before
from csi_driver.config.flags import Flag  # noqa: E402

_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fresh(text: str) -> str:
    """Return the document with every table as it should be."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_table(block[2])}{block[3]}", text)


def _table(name: str) -> str:
    kind, _, of = name.partition(" ")
    return "".join(f"{line}\n" for line in _KINDS[kind](of))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


# --- flags ------------------------------------------------------------------------------------------------------


def flags_of(command: str) -> Sequence[Flag[object]]:
    """Return the flags that a command takes."""
    return definition(command)[0]


def _flags(command: str) -> Iterator[str]:
    yield _row(["flag", "default", "environment", "what it does"])
    yield "|---|---|---|---|"
    for flag in flags_of(command):
        if flag.is_positional:
            yield _row([f"`{flag.name}`", "must be given", "", flag.help])
            continue
        name = f"`{flag.name}`" if flag.is_switch else f"`{flag.name} {flag.metavar}`"
        notes = [flag.help, *(["May be repeated."] if flag.repeatable else []), *_unit(flag)]
        yield _row([name, flag.shown_default or "must be given", f"`{flag.variable}`", " ".join(notes)])


def _unit(flag: Flag[object]) -> list[str]:
    return [f"Unit: {flag.unit}."] if flag.unit else []


def _commands(_: str) -> Iterator[str]:
    yield _row(["command", "what it does"])
    yield "|---|---|"
    yield from (_row([f"`nvmesh-csi {name}`", purpose]) for name, purpose in COMMANDS.items())


_KINDS: dict[str, Callable[[str], Iterator[str]]] = {"flags": _flags, "commands": _commands}


if __name__ == "__main__":
    DOCUMENT.write_text(fresh(DOCUMENT.read_text()))
