# SPDX-License-Identifier: Apache-2.0
"""Write the pages of the documentation site: the documents as they are, with links that lead to pages.

A hook of MkDocs (docs/site/mkdocs.yml), so `make docs-serve` follows changes. The navigation is the section "Documents"
of README.md. A file that a document links to (an example, a script) becomes a page with its text.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import yaml

from tests.documents import ROOT, section, slug, text_of

SCRIPT = ROOT / ".cache" / "mermaid.min.js"
"""Draws the diagrams in the reader's browser."""

PICTURES = (".png", ".svg")
"""Copied as they are; any other file is text."""

Navigation = list[dict[str, Any]]

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(?ms)^ *```.*?^ *```[ \t]*$")
_LANGUAGES = {".sh": "sh", ".yaml": "yaml", ".json": "json", ".py": "python"}


def on_config(config: MutableMapping[str, Any]) -> None:
    """Write the pages and set the navigation, each time that the site is built."""
    pages = Path(config["docs_dir"])
    write(pages)
    _update(pages / SCRIPT.name, SCRIPT.read_bytes())
    config["nav"] = navigation()


def write(pages: Path) -> None:
    """Write every page that the README leads to."""
    written: dict[str, str] = {}
    waiting = ["README.md"]
    while waiting:
        name = waiting.pop()
        if name in written:
            continue
        written[name], linked = _page(name)
        waiting += linked
    for name, text in written.items():
        _update(pages / place(name), text.encode())
    for picture in (ROOT / "docs").iterdir():
        if picture.suffix in PICTURES:
            _update(pages / picture.name, picture.read_bytes())
    _update(pages / "site.css", (ROOT / "docs" / "site" / "site.css").read_bytes())


def place(name: str) -> str:
    """Return the page of a file of the repository: its path in the site, before MkDocs makes HTML of it."""
    if name == "README.md":
        return "index.md"
    stem = name.removeprefix("docs/").removeprefix("deploy/")
    return stem if stem.endswith((".md", *PICTURES)) else f"{stem}.md"


def navigation() -> Navigation:
    """Return the groups of the README's list of documents, each with its links in their order."""
    listed = section(text_of("README.md"), "Documents")
    result: Navigation = [{"Home": "index.md"}]
    for heading, group in re.findall(r"(?ms)^### (.*?)\n(.*?)(?=^### |\Z)", listed):
        links = re.findall(r"\[([^\]]+)\]\(([^)#\s]+)\)", group)
        result.append({heading: [_entry(title, target) for title, target in links]})
    return result


def _entry(title: str, target: str) -> dict[str, Any]:
    if target != "docs/decisions/README.md":
        return {title: place(target)}
    decisions = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    return {title: [place(target), *(place(str(path.relative_to(ROOT))) for path in decisions)]}


def _page(name: str) -> tuple[str, list[str]]:
    """Return the page of a file, and the files that it links to."""
    path = ROOT / name
    if path.suffix != ".md":
        return (_api(path) if path.name == "storage-api.yaml" else _source(path)), []
    linked: list[str] = []

    def replaced(link: re.Match[str]) -> str:
        text, target, anchor = link.groups("")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        there = _file((path.parent / target).resolve())
        if (ROOT / there).is_dir():
            return text
        linked.append(there)
        return f"[{text}]({os.path.relpath(place(there), Path(place(name)).parent)}{anchor})"

    seen: Counter[str] = Counter()
    pieces = []
    for piece, is_code in _pieces(path.read_text()):
        pieces.append(_indented(piece) if is_code else _LINK.sub(replaced, _with_anchors(_indented(piece), seen)))
    return "".join(pieces), [there for there in linked if not there.endswith(PICTURES)]


def _file(path: Path) -> str:
    """Return the file that a link means: of a directory the one that says most."""
    for inside in ("README.md", "values.yaml"):
        path = path / inside if (path / inside).is_file() else path
    return str(path.relative_to(ROOT))


def _pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the text in pieces, each with whether it is a block of code."""
    at = 0
    for fence in _FENCE.finditer(text):
        yield text[at : fence.start()], False
        yield fence[0], True
        at = fence.end()
    yield text[at:], False


def _indented(piece: str) -> str:
    """Return a piece with four columns where code hosts take two or three: what continues an item of a list."""
    if block := re.match(r" {2,3}(?=```)", piece):
        return re.sub(r"(?m)^(?=.)", " " * (4 - len(block[0])), piece)
    return re.sub(r"(?m)^ {2,3}(?=\S)", "    ", piece)


def _with_anchors(piece: str, seen: Counter[str]) -> str:
    """Return a piece whose headings have the anchors that code hosts give them."""

    def named(heading: re.Match[str]) -> str:
        anchor = slug(heading[2])
        number = seen[anchor]
        seen[anchor] += 1
        return f"{heading[1]} {heading[2]} {{ #{anchor}{f'-{number}' if number else ''} }}"

    return re.sub(r"(?m)^(#{1,6}) (.*)$", named, piece)


def _source(path: Path) -> str:
    language = _LANGUAGES.get(path.suffix, "")
    return f"# {path.name}\n\n```{language}\n{path.read_text().rstrip()}\n```\n"


def _update(path: Path, content: bytes) -> None:
    """Write a file if it differs: MkDocs watches them while it serves the site."""
    if path.is_file() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- the routes of the storage manager ------------------------------------------------------------------------------


def _api(path: Path) -> str:
    """Return an OpenAPI document as text: routes with their parameters and answers, then the schemas."""
    api = yaml.safe_load(path.read_text())
    lines = [f"# {api['info']['title']}: routes", "", f"{api['info']['summary']}.", "", api["info"]["description"]]
    for route, methods in api["paths"].items():
        for method, call in methods.items():
            lines += [f"## {method.upper()} {route}", "", f"{call['summary']}.", "", call.get("description", ""), ""]
            lines += _table(
                ("parameter", "in", "type", "meaning"),
                [
                    (f"`{one['name']}`", one["in"], _type(one["schema"]), one.get("description", ""))
                    for one in call.get("parameters", ())
                ],
            )
            if body := call.get("requestBody"):
                lines += [f"Request: {_content(body)}.", ""]
            lines += [
                f"Answer {code}: {answer['description']}; {_content(answer)}.\n"
                for code, answer in call["responses"].items()
            ]
    lines += ["## Schemas", ""]
    for name, schema in api["components"]["schemas"].items():
        required = schema.get("required", ())
        lines += [f"### {name}", "", schema.get("description", ""), ""]
        lines += _table(
            ("field", "type", "required", "meaning"),
            [
                (f"`{field}`", _type(one), "yes" if field in required else "", one.get("description", ""))
                for field, one in schema.get("properties", {}).items()
            ],
        )
    return "\n".join([*lines, "", "## The document", "", "```yaml", path.read_text().rstrip(), "```", ""])


def _content(message: dict[str, Any]) -> str:
    return ", ".join(_type(content["schema"]) for content in message["content"].values())


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a schema in words, with a link to what it refers to."""
    if reference := schema.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if choices := schema.get("oneOf"):
        return " or ".join(_type(choice) for choice in choices)
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    kind = schema.get("type", "any")
    limits = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to")) if key in schema]
    return " ".join([" or ".join(kind) if isinstance(kind, list) else kind, *limits])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    cells = [head, tuple("---" for _ in head), *rows]
    return [*("| " + " | ".join(cell.strip().replace("|", r"\|") for cell in row) + " |" for row in cells), ""]
