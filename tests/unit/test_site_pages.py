# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation site: every document, links that lead to pages, headings with their anchors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.documents import NAMES, ROOT, anchors, fenced, unfenced
from tests.tools.site_pages import navigation, place, write


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pages")
    write(directory)
    return directory


def ids(page: Path) -> list[str]:
    return re.findall(r"(?m)^#+ .* \{ #(\S+) \}$", unfenced(page.read_text()))


def entries(group: Any) -> Iterator[str]:
    if isinstance(group, str):
        yield group
    else:
        for entry in group.values() if isinstance(group, dict) else group:
            yield from entries(entry)


def test_every_document_has_a_page(pages: Path) -> None:
    missing = [name for name in NAMES if not (pages / place(name)).is_file()]
    # The description of recordings is found next to them.
    assert missing == ["tests/recordings/README.md"]


def test_every_link_of_a_page_leads_to_a_page_and_a_heading(pages: Path) -> None:
    broken, followed = [], 0
    for page in pages.rglob("*.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", unfenced(page.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            followed += 1
            if not there.is_file() or (anchor and anchor not in ids(there) and page.name != "storage-api.yaml.md"):
                broken.append(f"{page.relative_to(pages)}: {target}")
    assert followed > 200
    assert broken == []


@pytest.mark.parametrize("name", ["README.md", "docs/parameters.md", "docs/upgrading.md"])
def test_the_headings_of_a_page_have_the_anchors_of_the_document(name: str, pages: Path) -> None:
    found = ids(pages / place(name))
    assert len(found) == len(set(found))
    assert set(found) == anchors((ROOT / name).read_text())


def test_the_navigation_names_each_page_once(pages: Path) -> None:
    count = Counter(entries(navigation()))
    assert [name for name, times in count.items() if times > 1] == []
    assert [name for name in count if not (pages / name).is_file()] == []
    documents = {place(name) for name in NAMES} - {"tests/recordings/README.md"}
    assert documents - set(count) == set()


def test_a_code_block_in_a_numbered_step_stays_in_the_step(pages: Path) -> None:
    text = (pages / "RELEASE.md").read_text()
    blocks = re.findall(r"(?ms)^( +)```sh\n(.*?)^ *```", text)
    assert len(blocks) == 2
    assert {indent for indent, _ in blocks} == {"    "}
    assert [line for _, block in blocks for line in block.splitlines() if line and not line.startswith("    ")] == []


def test_the_page_of_the_routes_has_every_route_and_schema(pages: Path) -> None:
    api = yaml.safe_load((ROOT / "docs" / "storage-api.yaml").read_text())
    text = (pages / "storage-api.yaml.md").read_text()
    headings = set(re.findall(r"(?m)^##+ (.*)$", text))
    routes = {f"{method.upper()} {route}" for route, methods in api["paths"].items() for method in methods}
    assert headings >= routes | set(api["components"]["schemas"])


def test_the_page_of_an_example_is_the_example(pages: Path) -> None:
    (shown,) = fenced((pages / "examples" / "training.yaml.md").read_text(), "yaml")
    assert shown == (ROOT / "deploy" / "examples" / "training.yaml").read_text()


def test_the_site_loads_nothing_from_another_host() -> None:
    settings = (ROOT / "docs" / "site" / "mkdocs.yml").read_text()
    style = (ROOT / "docs" / "site" / "site.css").read_text()
    assert re.findall(r"https?://|@import|url\(", re.sub(r"(?m)^#.*$", "", settings) + style) == []
    assert re.findall(r"(?m)^  font: (.*)$", settings) == ["false"]
