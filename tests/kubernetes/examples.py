# SPDX-License-Identifier: Apache-2.0
"""The files of deploy/examples, which the tests apply as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
SHARE_CLAIM = EXAMPLES / "share-claim.sh"
IMAGE = "docker.io/library/busybox:1.37"
"""Image of all examples; tests/kubernetes/cluster/images.py puts one of this name into the cluster."""

Document = dict[str, Any]


def files() -> list[Path]:
    """Return every example."""
    return sorted(EXAMPLES.glob("*.yaml"))


def written(name: str) -> list[Document]:
    """Return the documents of an example."""
    return [document for document in yaml.safe_load_all((EXAMPLES / name).read_text()) if document is not None]


def pod_specs(document: Document) -> Iterator[Document]:
    """Yield the specification of the pod that a document describes, by itself or as a template."""
    if document["kind"] == "Pod":
        yield document["spec"]
    elif "spec" in document.get("spec", {}).get("template", {}):
        yield document["spec"]["template"]["spec"]


def of_kind(kind: str, among: list[Document]) -> list[Document]:
    """Return the documents of a kind."""
    return [document for document in among if document["kind"] == kind]
