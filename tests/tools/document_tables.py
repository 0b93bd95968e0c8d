# SPDX-License-Identifier: Apache-2.0
"""Write the tables of documents that follow from the code: flags, options of mkfs, checks of doctor.

The text between `<!-- table: NAME -->` and `<!-- end of table -->` is generated from the program; the rest is written
by hand. `make docs` runs it; a test compares the document with its output.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from csi_driver.config import COMMANDS, command_class
from csi_driver.config.command import flags_of
from csi_driver.flags import Flag, read_boolean
from csi_driver.local.doctor_checks import checks
from csi_driver.parameters.mkfs import ALLOWED
from tests.tools.chart_schema import OWN_VALUES, value_name

ROOT = Path(__file__).parents[2]
DOCUMENTS = tuple(ROOT / "docs" / name for name in ("parameters.md", "mkfs.md", "doctor.md"))

_BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def fresh(text: str) -> str:
    """Return the document with every table as it should be."""
    return _BLOCK.sub(lambda block: f"{block[1]}{_table(block[2])}{block[3]}", text)


def _table(name: str) -> str:
    kind, _, of = name.partition(" ")
    return "".join(f"{line}\n" for line in _KINDS[kind](of))


def row(cells: Iterable[str]) -> str:
    """Return a row of a table."""
    return f"| {' | '.join(_cell(text) for text in cells)} |"


def _cell(text: str) -> str:
    """Return text for a cell: separators and tags are escaped."""
    spans = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(span if span.startswith("`") else span.replace("<", "&lt;") for span in spans)


# --- flags ------------------------------------------------------------------------------------------------------


def _flags(command: str) -> Iterator[str]:
    """Yield the table of a command's flags; a command outside the chart leaves out flags of the commands above."""
    in_chart = command in OWN_VALUES
    above = {} if in_chart else _flags_above(command)
    flags = flags_of(command_class(command))
    yield row(["flag", "default", "environment", *(["value of the chart"] * in_chart), "description"])
    yield "|---|---|---|---|" + "---|" * in_chart
    for flag in flags.values():
        if flag.describe() == above.get(flag.name):
            continue
        if flag.is_positional:
            yield row([f"`{flag.name}`", flag.shown_default or "required", "", flag.explain()])
            continue
        name = f"`{flag.name}`" if flag.read is read_boolean else f"`{flag.name} {flag.read.metavar}`"
        value = [_chart_value(command, flag)] if in_chart else []
        yield row([name, flag.shown_default or "required", f"`{flag.variable}`", *value, flag.explain()])

    same = [f"`{name}`" for name, flag in flags.items() if flag.describe() == above.get(name)]
    if same:
        yield from ("", *textwrap.wrap(f"As above: {', '.join(same)}.", 100, break_on_hyphens=False))


def _flags_above(command: str) -> dict[str, str]:
    """Return the help of the flags of all commands that the document shows before this one."""
    found: dict[str, str] = {}
    for name in itertools.takewhile(lambda name: name != command, COMMANDS):
        found |= {each.name: each.describe() for each in flags_of(command_class(name)).values()}
    return found


def _chart_value(role: str, flag: Flag[object]) -> str:
    own = OWN_VALUES[role].get(flag.name, f"{role}.flags.{value_name(flag)}")
    return re.sub(r"[\w.]*\w\.\w[\w.]*|^\w+$|\b\w+(?= and )", r"`\g<0>`", own)


def _commands(_: str) -> Iterator[str]:
    yield row(["command", "description"])
    yield "|---|---|"
    yield from (row([f"`nvmesh-csi {name}`", purpose]) for name, purpose in COMMANDS.items())


def _doctor(_: str) -> Iterator[str]:
    yield row(["check", "why it matters", "expected", "fix"])
    yield "|---|---|---|---|"
    yield from (row([f"`{check.name}`", check.why, check.expected, check.fix]) for check in checks())


# --- options of mkfs --------------------------------------------------------------------------------------------


def _mkfs(fs_type: str) -> Iterator[str]:
    yield row([f"option of mkfs.{fs_type}", "value"])
    yield "|---|---|"
    yield from (row([f"`{flag}`", value.says if value else "none"]) for flag, value in ALLOWED[fs_type].items())


_KINDS: dict[str, Callable[[str], Iterator[str]]] = {
    "flags": _flags, "commands": _commands, "mkfs": _mkfs, "doctor": _doctor,
}  # fmt: skip


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fresh(document.read_text()))
