# SPDX-License-Identifier: Apache-2.0
"""The publish context that the controller passes to the node."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some

from csi_driver.publish_context import Encryption, History, PublishContext

UUID = "0a1b2c3d-0000-4000-8000-0123456789ab"
NATURAL = some.integers(0, 10**18)

contexts = some.builds(
    PublishContext,
    name=some.just("csi-1"),
    uuid=some.just(UUID),
    attachment=NATURAL,
    history=some.sampled_from(History),
    read_only=some.booleans(),
    size_bytes=NATURAL,
    encryption=some.sampled_from(Encryption),
    format_allowed=some.booleans(),
    stripe_unit_bytes=NATURAL,
    stripe_bytes=NATURAL,
    populated=some.booleans(),
    inherited_uuids=some.lists(some.uuids().map(str), max_size=32).map(tuple),
    private_copy=some.booleans(),
)


@given(contexts)
def test_a_publish_context_survives_the_way_through_a_string_map(context: PublishContext) -> None:
    assert PublishContext.from_map(context.as_map()) == context


def test_an_encryption_that_this_node_does_not_know_is_not_taken_for_none() -> None:
    context = PublishContext.from_map({"name": "csi-1", "uuid": UUID, "encryption": "quantum"})
    assert context is not None
    assert context.encryption is Encryption.UNKNOWN


def test_what_allows_to_format_is_the_plain_word_true_alone() -> None:
    for word in ("True", "1", "yes", ""):
        context = PublishContext.from_map({"name": "csi-1", "uuid": UUID, "formatAllowed": word})
        assert context is not None
        assert not context.format_allowed


def test_an_inherited_uuid_that_is_none_is_left_out() -> None:
    text = f"{UUID.upper()},,csi-1, {UUID}"
    context = PublishContext.from_map({"name": "csi-1", "uuid": UUID, "inheritedUuids": text})
    assert context is not None
    assert context.inherited_uuids == (UUID,)
