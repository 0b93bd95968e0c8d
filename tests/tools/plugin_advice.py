# SPDX-License-Identifier: Apache-2.0
"""Write csi_driver/plugin/advice.json: messages of the documents with meaning and action, for `kubectl nvmesh why`.

A table of a document with a column for messages has one entry for each row. `make docs` runs it; a test compares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tests.documents import ROOT, anchors, code, slug, tables, text_of

ADVICE = ROOT / "csi_driver" / "plugin" / "advice.json"
DOCUMENTS = ("docs/troubleshooting.md", "docs/fencing.md", "docs/encryption.md", "docs/nvme-tcp.md")
MESSAGES = ("message", "Kubernetes message", "log message")
_LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")


def advice() -> list[dict[str, Any]]:
    return [entry for name in DOCUMENTS for entry in _of(name)]


def _of(name: str) -> Iterator[dict[str, Any]]:
    place = ""
    for part in re.split(r"(?m)^(?=#+ )", text_of(name)):
        heading = re.match(r"#+ (.*)\n", part)
        if heading is not None and slug(heading[1]) in anchors(text_of(name)):
            place = f"{name}#{slug(heading[1])}"
        for row in (row for rows in tables(part) for row in rows):
            cell = next((row[column] for column in MESSAGES if column in row), "")
            quoted = [text for text in code(cell) if len(text) >= 12]
            if quoted:
                texts = {"meaning": _plain(row.get("meaning", ""), name), "action": _plain(row.get("action", ""), name)}
                yield {"messages": quoted, **texts, "place": place}


def _plain(text: str, name: str) -> str:
    """Return a cell without Markdown; a link says its document."""

    def link(found: re.Match[str]) -> str:
        target = found[2] if not found[2].startswith("#") else f"{name.removeprefix('docs/')}{found[2]}"
        return f"{found[1]} (docs/{target})"

    return _LINK.sub(link, text.replace("\\|", "|")).replace("`", "'").replace("&lt;", "<")


def written() -> str:
    return json.dumps(advice(), indent=1, ensure_ascii=True) + "\n"


if __name__ == "__main__":
    ADVICE.write_text(written())
