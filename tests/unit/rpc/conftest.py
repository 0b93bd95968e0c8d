# SPDX-License-Identifier: Apache-2.0
"""An endpoint over fakes, on a real Unix socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rpc.fakes import Endpoint, serving


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[Endpoint]:
    with serving(tmp_path / "csi.sock") as served:
        yield served
