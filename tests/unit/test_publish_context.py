# SPDX-License-Identifier: Apache-2.0
"""The publish context that the controller passes to the node."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from csi_driver.errors import PreconditionFailed
from csi_driver.nvme_model import NvmeExport, subsystem_nqn
from csi_driver.publish_context import Encryption, History, PublishContext

UUID = "0a1b2c3d-0000-4000-8000-0123456789ab"
NATURAL = some.integers(0, 10**18)

PORTS = some.integers(1, 0xFFFF)
PATHS = some.one_of(
    some.builds("{}:{}".format, some.ip_addresses(v=4), PORTS),
    some.builds("[{}]:{}".format, some.ip_addresses(v=6), PORTS),
)
exports = some.builds(
    NvmeExport,
    nqn=some.builds(
        subsystem_nqn, some.uuids().map(str), some.uuids().map(str), some.integers(0, 1 << 64).map("{:016x}".format)
    ),
    paths=some.lists(PATHS, min_size=1, max_size=16).map(tuple),
    block_bytes=some.sampled_from((512, 4096)),
)
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
    nvme=some.none() | exports,
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


NVME = {
    "name": "csi-1",
    "uuid": UUID,
    "nvme.nqn": subsystem_nqn(UUID, UUID, "00aa"),
    "nvme.paths": "10.0.0.1:23001,[fd00::1]:23001",
    "nvme.blockBytes": "4096",
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"nvme.nqn": ""},
        {"nvme.nqn": "nqn.2026-11.com.example:a,hostnqn=b"},
        {"nvme.nqn": "nqn.2026-11.com.example:a\n"},
        {"nvme.nqn": "nqn.2026-11.com.example:" + "a" * 200},
        {"nvme.paths": ""},
        {"nvme.paths": "10.0.0.1"},
        {"nvme.paths": "10.0.0.1:0"},
        {"nvme.paths": "10.0.0.1:70000"},
        {"nvme.paths": "storage.example:23001"},
        {"nvme.paths": "fd00::1:23001"},
        {"nvme.paths": "[10.0.0.1]:23001"},
        {"nvme.paths": "[fe80::1%eth0]:23001"},
        {"nvme.paths": "10.0.0.1:23001,"},
        {"nvme.paths": ",".join(f"10.0.0.{number}:1" for number in range(17))},
        {"nvme.blockBytes": "4K"},
        {"nvme.blockBytes": "0"},
    ],
)
def test_an_export_that_cannot_be_read_is_refused_and_not_taken_for_none(wrong: dict[str, str]) -> None:
    with pytest.raises(PreconditionFailed, match=r"nvme\.\*"):
        PublishContext.from_map({**NVME, **wrong})


@pytest.mark.parametrize("left_out", ["nvme.nqn", "nvme.paths", "nvme.blockBytes"])
def test_a_part_of_an_export_is_refused(left_out: str) -> None:
    with pytest.raises(PreconditionFailed):
        PublishContext.from_map({key: text for key, text in NVME.items() if key != left_out})
