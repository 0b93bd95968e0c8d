# SPDX-License-Identifier: Apache-2.0
"""The templates: every value is escaped, and a name that a template does not get is an error."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from csi_driver.status_page.model import readable


def render(template: str, values: Mapping[str, Any]) -> str:
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    made.filters |= {"size": readable, "number": lambda number: f"{number:,}", "percent": percent}
    made.globals |= {"link": link, "now": lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")}
    return made


def percent(part: int, whole: int) -> float:
    """Return a part in percent, from 0 to 100."""
    return round(min(100.0, max(0.0, 100.0 * part / whole)), 1) if whole > 0 else 0.0


def link(path: str, **query: object) -> str:
    """Return a relative address, with those parameters that have a value."""
    given = {name: value for name, value in query.items() if value not in ("", None, False)}
    return (path or "./") + (f"?{urlencode(given, errors='replace')}" if given else "")
