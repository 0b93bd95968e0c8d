# SPDX-License-Identifier: Apache-2.0
"""The project's documents, taken apart for tests: tables, headings, links, quotations, commands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "deploy/**/*.md", "tests/**/*.md", "proto/**/*.md")
    for path in ROOT.glob(pattern)
)
"""Every document in Markdown. Hidden directories are excluded."""

NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]

Row = Mapping[str, str]

_CODE = re.compile(r"`([^`]+)`")
_CELL_BORDER = re.compile(r"(?<!\\)\|")


def text_of(name: str) -> str:
    """Return the text of a document, by its path below the project's root, or below docs/."""
    path = ROOT / name if (ROOT / name).exists() else ROOT / "docs" / name
    return path.read_text()


def fenced(text: str, language: str) -> list[str]:
    """Return the blocks of one language."""
    return re.findall(rf"(?m)^```{language}\n(.*?)^```", text, re.DOTALL)


def unfenced(text: str) -> str:
    """Return the text without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```[ \t]*$", "", text)


def section(text: str, heading: str) -> str:
    """Return the text under a heading, up to the next one of its level or above."""
    found = re.search(rf"(?m)^(#+) {re.escape(heading)}$", text)
    assert found is not None, f"there is no heading {heading!r}"
    rest = text[found.end() :]
    end = re.search(rf"(?m)^#{{1,{len(found[1])}}} ", rest)
    return rest[: end.start()] if end else rest


def tables(text: str) -> list[list[Row]]:
    """Return the tables of a text: their rows by the names of the columns."""
    blocks = re.findall(r"(?m)(?:^\|.*\|$\n?)+", unfenced(text))
    return [_rows(block.splitlines()) for block in blocks]


def table(text: str, *columns: str) -> list[Row]:
    """Return the rows of all tables that have these columns."""
    return [row for rows in tables(text) for row in rows if set(columns) <= row.keys()]


def code(cell: str) -> list[str]:
    """Return the code spans of a text."""
    return [span.replace("\\|", "|") for span in _CODE.findall(cell)]


def _rows(lines: Sequence[str]) -> list[Row]:
    names, _, *rows = ([cell.strip() for cell in _CELL_BORDER.split(line)[1:-1]] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


def slug(heading: str) -> str:
    """Return the anchor of a heading, as the places that show Markdown make it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w -]", "", plain).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return every anchor of a document; of equal headings the later ones are numbered."""
    found: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"(?m)^#{1,6} (.*)$", unfenced(text)):
        name = slug(heading)
        seen = found.get(name, 0)
        found[name] = seen + 1
        result.add(f"{name}-{seen}" if seen else name)
    return result
