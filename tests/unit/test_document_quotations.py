# SPDX-License-Identifier: Apache-2.0
"""Quotations in documents equal the program's messages and log lines.

Tables quote in columns with these headings; `...` replaces variable parts, also where one message contains another.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.documents import NAMES, ROOT, code, tables, text_of

SPEAKERS = ("message", "log message")
_VARIES = re.compile(r"%[-+ #0-9.]*[a-z]")
_ENOUGH = 12
"""Letters that tell a message from any other text."""


@cache
def said_by_the_program() -> tuple[str, ...]:
    """Return every constant piece of text in the program, without docstrings.

    The plugin is left out: it looks for messages of others.
    """
    files = (path for path in sorted((ROOT / "csi_driver").rglob("*.py")) if not {"pb", "plugin"} & set(path.parts))
    return tuple(piece for path in files for piece in pieces(path.read_text()))


def pieces(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield from _VARIES.split(node.value)


def quotations(text: str) -> list[str]:
    rows = (row for rows in tables(text) for row in rows)
    return [quoted for row in rows for speaker in SPEAKERS for quoted in code(row.get(speaker, ""))]


def is_said(quoted: str) -> bool:
    parts = [part.strip() for part in quoted.split("...") if part.strip()]
    return any(len(part) >= _ENOUGH for part in parts) and all(
        any(part in piece for piece in said_by_the_program()) for part in parts
    )


@pytest.mark.parametrize("name", [name for name in NAMES if quotations(text_of(name))])
def test_whatever_a_document_quotes_is_said_by_the_program(name: str) -> None:
    assert [quoted for quoted in quotations(text_of(name)) if not is_said(quoted)] == []


def test_the_documents_for_bad_nights_quote_the_program() -> None:
    assert {name for name in NAMES if quotations(text_of(name))} >= {"docs/fencing.md", "docs/troubleshooting.md"}


def test_a_text_that_nobody_says_is_no_quotation() -> None:
    assert is_said("volume ... is still attached to ...; detach it first")
    assert not is_said("volume ... is still fastened to ...; detach it first")
    assert not is_said("volume ...")
