# SPDX-License-Identifier: Apache-2.0
"""Names and texts come out of the chart as the words that they are, also those that YAML takes for something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.chart.rendering import Rendered, helm, render

pytestmark = [pytest.mark.tool, pytest.mark.skipif(helm() is None, reason="needs helm: make helm")]

ODD = ["123", "0123", "no", "null", "2026-11-24"]
"""Names that Kubernetes takes, and that YAML takes for numbers, truth, nothing and a day."""
MAPS_OF_WORDS = {"labels", "matchLabels", "annotations", "nodeSelector", "parameters"}
WORDS = {"name", "namespace", "secretName", "secret", "path", "priorityClassName", "serviceAccountName", "provisioner"}


def not_words(value: Any, place: str) -> Iterator[str]:
    """Yield what ought to be a word and is not."""
    if isinstance(value, dict):
        for key, inner in value.items():
            here = f"{place}.{key}"
            words = inner.values() if key in MAPS_OF_WORDS and isinstance(inner, dict) else ()
            yield from (f"{here}: {word!r}" for word in words if not isinstance(word, str))
            if key in WORDS and not isinstance(inner, (str, dict)):
                yield f"{here}: {inner!r}"
            yield from not_words(inner, here)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            if place.endswith((".args", ".command", ".mountOptions", ".values")) and not isinstance(inner, str):
                yield f"{place}.{number}: {inner!r}"
            yield from not_words(inner, f"{place}.{number}")


def wrong(rendered: Rendered) -> list[str]:
    return [
        f"{each['kind']} {place}"
        for each in rendered.manifests
        for place in not_words({key: inner for key, inner in each.items() if key != "data"}, "")
    ]


def named(odd: str) -> dict[str, Any]:
    """Return values in which everything that has a name has this one."""
    return {
        "global": {"imagePullSecrets": [odd]},
        "image": {"tag": odd},
        "zone": odd,
        "management": {
            "servers": ["https://m:4000"],
            "existingSecret": odd,
            "tls": {"caSecret": odd, "clientCertificateSecret": odd},
        },
        "controller": {"priorityClassName": odd, "nodeSelector": {"a": odd}, "podLabels": {"a": odd}},
        "node": {"serviceAccount": {"name": odd}, "olderTopologyConfigMap": odd, "podAnnotations": {"a": odd}},
        "storage": {"enabled": True, "nodeName": odd, "existingSecret": odd, "user": odd},
        "storageClasses": [{"name": odd, "parameters": {"vpg": odd}, "mountOptions": [odd]}],
        "volumeAttributesClasses": [{"name": odd, "parameters": {"description": odd}}],
        "commonLabels": {"b": odd},
        "rbac": {"secrets": {"namespaces": [odd]}},
        "networkPolicy": {
            "enabled": True,
            "egress": {
                "enabled": True,
                "dnsNamespace": odd,
                "apiServer": {"cidrs": ["10.0.0.1/32"]},
                "management": {"cidrs": ["10.0.0.2/32"]},
            },
        },
        "openshift": {"enabled": True},
        "monitoring": {"podMonitor": {"enabled": True}, "alerts": {"enabled": True}, "dashboard": {"enabled": True}},
        "test": {"storageClass": odd},
    }


@pytest.mark.parametrize("odd", ODD)
def test_every_name_stays_a_word(odd: str) -> None:
    rendered = render(values=named(odd) | {"fullnameOverride": "x"}, release=odd, namespace=odd)
    assert wrong(rendered) == []
    assert rendered.one("Deployment", "controller")["metadata"]["namespace"] == odd
    assert {each["metadata"]["labels"]["app.kubernetes.io/instance"] for each in rendered.manifests} == {odd}


@pytest.mark.parametrize("odd", ["123", "no"])
def test_an_objects_whole_name_stays_a_word(odd: str) -> None:
    values = named("x") | {"fullnameOverride": odd, "storage": {"enabled": False}}
    assert wrong(render(values=values)) == []


@pytest.mark.parametrize("user", ["no", "a: b #c", "x: {y}", 'says "so"', "back\\slash", "two\nlines"])
def test_a_user_comes_as_it_is(user: str) -> None:
    nvmesh = {"management": {"servers": ["https://m:4000"], "existingSecret": "s", "user": user}}
    assert f"--management-user={user}" in render(values=nvmesh).args("controller/driver")
    embedded = render(values={"storage": {"enabled": True, "nodeName": "box", "user": user}})
    assert f"--management-user={user}" in embedded.args("controller/driver")
    assert f"--user={user}" in embedded.args("storage/storage")
