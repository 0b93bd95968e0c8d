# SPDX-License-Identifier: Apache-2.0
"""No error in a clusters file reveals a password."""

from __future__ import annotations

import contextlib
import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from csi_driver.management.clusters import names_in, parse_clusters
from csi_driver.yaml_document import InvalidDocument, Source
from tests.unit.management.test_clusters_file import CONFIG_MAP, NOTHING, TOPOLOGY, USER

SECRET = "hush-a"
TEXTS = [
    json.dumps(TOPOLOGY),
    json.dumps(TOPOLOGY, indent=1),
    json.dumps({**CONFIG_MAP, "user": "u", "password": SECRET}),
    json.dumps({"apiParams": {"managementServers": "m", "user": "u", "password": SECRET, "tlsVerify": True}}),
    "zones:\n  a:\n    management:\n      servers: m\n      user: u\n      password: hush-a\n      tlsVerify: no\n",
    "zones: {a: {servers: m, user: u, password: hush-a}}",
]
EDITS = st.lists(
    st.tuples(
        st.integers(0, 600), st.integers(0, 3), st.sampled_from(["", " ", "\n", ",", ":", '"', "{", "}", "- ", "#"])
    ),
    max_size=1,
)


def said(source: Source) -> str:
    """Return everything that is printed about it."""
    shown = []
    for defaults in (NOTHING, USER):
        try:
            file = parse_clusters(source, defaults)
            shown.append(f"{file!r} {file.warnings}")
        except InvalidDocument as unusable:
            shown.append(f"{unusable} {unusable!r}")
    with contextlib.suppress(InvalidDocument):
        shown.append(repr(names_in(source)))
    return " ".join(shown)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(TEXTS), EDITS)
@example(TEXTS[0], [(TEXTS[0].index('": "hush-a') + 1, 1, ",")])
def test_no_typing_error_reveals_a_password(text: str, edits: list[tuple[int, int, str]]) -> None:
    for at, length, put in edits:
        place = at % (len(text) + 1)
        text = text[:place] + put + text[place + length :]
    if SECRET in text:
        assert SECRET not in said(text)
        assert SECRET not in said({"topology": text})
