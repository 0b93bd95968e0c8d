# SPDX-License-Identifier: Apache-2.0
"""Our csi.proto against the one that the specification publishes: everything but comments and order is the same.

The published file comes from the Go module github.com/container-storage-interface/spec, through the go command.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from google.protobuf.message import Message
from grpc_tools import protoc

# Registers the custom options, so that they are read as options with names, not as unknown bytes.
from csi_driver.rpc.pb import csi_pb2

MODULE = "github.com/container-storage-interface/spec@v1.13.0"
OURS = Path(__file__).parents[2] / "proto" / "csi.proto"

Facts = dict[str, object]


@pytest.fixture(scope="module")
def published() -> Path:
    """Return the specification's own csi.proto."""
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin:/usr/lib/go/bin")
    if go is None:
        pytest.skip(f"needs the go command to fetch {MODULE}; install Go and run again")
    done = subprocess.run([go, "mod", "download", "-json", MODULE], capture_output=True, text=True)
    if done.returncode != 0:
        reason = json.loads(done.stdout).get("Error", "") if done.stdout.strip() else done.stderr
        pytest.skip(f"go could not fetch {MODULE} (is its module proxy reachable?): {reason.strip()[-300:]}")
    return Path(json.loads(done.stdout)["Dir"]) / "csi.proto"


@pytest.fixture(scope="module")
def ours_and_theirs(published: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, Facts]:
    """Return the facts of both descriptors."""
    scratch = tmp_path_factory.mktemp("descriptors")
    return describe(compiled(OURS, scratch)), describe(compiled(published, scratch))


def compiled(proto: Path, scratch: Path) -> FileDescriptorProto:
    output = scratch / "descriptor.bin"
    well_known = Path(protoc.__file__).parent / "_proto"
    arguments = ["protoc", f"-I{proto.parent}", f"-I{well_known}", f"--descriptor_set_out={output}", proto.name]
    assert protoc.main(arguments) == 0
    (file,) = FileDescriptorSet.FromString(output.read_bytes()).file
    return file


def options(message: Message) -> list[tuple[str, object]]:
    return sorted((field.full_name, value) for field, value in message.ListFields())


def describe(file: FileDescriptorProto) -> Facts:
    """Return everything a descriptor says, as one flat table that does not depend on order."""
    facts: Facts = {
        "file": (file.name, file.package, file.syntax, sorted(file.dependency), options(file.options)),
    }
    for field in file.extension:
        facts[f"extend {field.extendee} {field.name}"] = field_facts(field, None)
    for enum in file.enum_type:
        facts.update(enum_facts(file.package, enum))
    for message in file.message_type:
        facts.update(message_facts(file.package, message))
    for service in file.service:
        facts[f"service {service.name}"] = options(service.options)
        for method in service.method:
            streams = (method.client_streaming, method.server_streaming)
            types = (method.input_type, method.output_type)
            facts[f"rpc {service.name}.{method.name}"] = (types, streams, options(method.options))
    return facts


def message_facts(scope: str, message: DescriptorProto) -> Iterator[tuple[str, object]]:
    name = f"{scope}.{message.name}"
    reserved = (sorted((item.start, item.end) for item in message.reserved_range), sorted(message.reserved_name))
    yield f"message {name}", (reserved, sorted(item.name for item in message.oneof_decl), options(message.options))
    for field in message.field:
        oneof = message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
        yield f"field {name}.{field.name}", field_facts(field, oneof)
    for enum in message.enum_type:
        yield from enum_facts(name, enum)
    for nested in message.nested_type:
        yield from message_facts(name, nested)


def field_facts(field: FieldDescriptorProto, oneof: str | None) -> tuple[object, ...]:
    kind = (field.type, field.type_name, field.label)
    return (field.number, kind, oneof, field.proto3_optional, field.json_name, options(field.options))


def enum_facts(scope: str, enum: EnumDescriptorProto) -> Iterator[tuple[str, object]]:
    name = f"{scope}.{enum.name}"
    reserved = (sorted((item.start, item.end) for item in enum.reserved_range), sorted(enum.reserved_name))
    yield f"enum {name}", (reserved, options(enum.options))
    for value in enum.value:
        yield f"value {name}.{value.name}", (value.number, options(value.options))


def test_descriptor_equals_the_published_one(ours_and_theirs: tuple[Facts, Facts]) -> None:
    ours, theirs = ours_and_theirs
    assert len(theirs) > 400, "the published descriptor was not read whole"
    assert ours == theirs


def test_custom_options_are_part_of_the_comparison(ours_and_theirs: tuple[Facts, Facts]) -> None:
    _, theirs = ours_and_theirs
    secret = [name for name, fact in theirs.items() if "csi.v1.csi_secret" in str(fact) and name.startswith("field")]
    assert len(secret) == 22, "the number of fields that the specification marks csi_secret"
    assert csi_pb2.CreateVolumeRequest.DESCRIPTOR.fields_by_name["secrets"].GetOptions().Extensions[csi_pb2.csi_secret]


def required_fields(proto: Path) -> set[str]:
    """Return "Message.field" of each field whose comment calls it REQUIRED."""
    found: set[str] = set()
    scopes: list[str] = []
    marked = False
    for text in map(str.strip, proto.read_text().splitlines()):
        if text.startswith("//"):
            marked |= bool(re.search(r"REQUIRED(?! with)", text))
            continue
        field = re.match(r"(?:repeated )?[\w.]+(?:<.*>)? (\w+) = \d+", text)
        if field and marked:
            found.add(".".join([*scopes, field[1]]))
        marked = False
        block = re.match(r"message (\w+) \{", text)
        scopes += [block[1] if block else ""] * (text.count("{") - text.count("}"))
        scopes = scopes[:-1] if text.startswith("}") else scopes
    return {name.replace("..", ".") for name in found}


def test_required_marks_are_the_published_ones(published: Path) -> None:
    assert len(required_fields(published)) > 80, "the published marks were not read"
    assert required_fields(OURS) == required_fields(published)
