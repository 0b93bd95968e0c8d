# SPDX-License-Identifier: Apache-2.0
"""Random requests are never answered INTERNAL or UNKNOWN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.rpc.contract import RPCS, Rpc
from tests.unit.rpc.fakes import Endpoint, code_of, request_class, serving

NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
CASES = [pytest.param(rpc, id=rpc.name) for rpc in RPCS.values()]

TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["", "/", "..", "/a/../../etc", "csi-1", "zone-1:csi-1", ":::", "a" * 300, "--bind", "x\0y", "é\n", "\u202e"]
    ),
    st.integers(100, 5000).map(lambda length: "x" * length),
)
NUMBER = st.one_of(st.integers(-(2**31), 2**31 - 1), st.sampled_from([0, 1, -1]))


def messages(descriptor: Descriptor, depth: int = 0) -> st.SearchStrategy[Message]:
    """Generate messages with any of their fields set to anything that their type allows."""
    chosen = {field.name: values(field, depth) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=chosen).map(
        lambda content: GetMessageClass(descriptor)(**{k: v for k, v in content.items() if v is not None})
    )


def values(field: FieldDescriptor, depth: int) -> st.SearchStrategy[object]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return st.dictionaries(TEXT, TEXT, max_size=4)
    single: st.SearchStrategy[object] = NUMBER
    if kind is not None:
        single = messages(kind, depth + 1)
    elif field.type == FieldDescriptor.TYPE_STRING:
        single = TEXT
    elif field.type == FieldDescriptor.TYPE_BOOL:
        single = st.booleans()
    elif field.type == FieldDescriptor.TYPE_ENUM:
        single = st.one_of(st.integers(0, 7), NUMBER)
    return st.lists(single, max_size=3) if field.is_repeated else single


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with serving(tmp_path_factory.mktemp("fuzz") / "csi.sock") as endpoint:
        yield endpoint


@pytest.mark.parametrize("rpc", CASES)
def test_no_request_is_answered_with_a_bug(shared: Endpoint, rpc: Rpc) -> None:
    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(messages(cast("Descriptor", request_class(rpc).DESCRIPTOR)))
    def answer(request: Message) -> None:
        assert code_of(lambda: shared.invoke(rpc, request)) not in NEVER

    answer()


@pytest.mark.parametrize("rpc", CASES)
def test_no_bytes_are_answered_with_a_bug(shared: Endpoint, rpc: Rpc) -> None:
    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=200))
    def answer(data: bytes) -> None:
        assert code_of(lambda: shared.send(rpc.method, data)) not in NEVER

    answer()
