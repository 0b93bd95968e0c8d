# SPDX-License-Identifier: Apache-2.0
"""List the images that the chart can use, also those of optional sidecars: `python -m tests.tools.chart_images`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "nvmesh-csi-driver"


def images(chart: Path = CHART) -> list[str]:
    """Return the images of the values, the driver's first."""
    version = yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"]
    found = [
        f"{image['repository']}:{image['tag'] or version}"
        for image in _images(yaml.safe_load((chart / "values.yaml").read_text()))
    ]
    return list(dict.fromkeys(found))


def _images(values: Any) -> Iterator[dict[str, str]]:
    if isinstance(values, dict):
        if {"repository", "tag"} <= values.keys():
            yield values
        for value in values.values():
            yield from _images(value)


if __name__ == "__main__":
    import sys

    print("\n".join(images(*map(Path, sys.argv[1:]))))
