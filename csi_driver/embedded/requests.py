# SPDX-License-Identifier: Apache-2.0
"""Requests of the API: limits of a body, and models of the bodies.

As in the server's own schemas, unknown fields, values of another JSON type and nulls are invalid, unless stated, and a
float without a fraction is an integer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from csi_driver.embedded.layouts import CONCATENATED, EC, PARAMETERS, RAID_1, Layout
from csi_driver.embedded.model import Document
from csi_driver.http_requests import MAX_BODY_BYTES, HttpRequest
from csi_driver.nvme_model import is_dhchap_key

_MAX_METADATA_BYTES = 256 * 1024
_MAX_LEVELS = 100
"""As deep as the server's database takes a document; documents are copied by recursion."""


class Unusable(Exception):
    """The request is refused with an HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


def read_body(request: HttpRequest) -> object:
    """Return the decoded JSON body. Raises Unusable where it is none, too large or nested too deep."""
    if not request.content_type.startswith("application/json"):
        raise Unusable(415, "expected a body of the type application/json")
    if len(request.body) > MAX_BODY_BYTES:
        raise Unusable(413, "request entity too large")
    try:
        decoded: object = json.loads(request.body or b"{}", parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as problem:
        raise Unusable(400, "the body is no JSON") from problem
    if _is_deeper(decoded, _MAX_LEVELS):
        raise Unusable(400, f"the body is nested deeper than {_MAX_LEVELS} levels")
    return decoded


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is no JSON")


def _is_deeper(value: object, levels: int) -> bool:
    inside = [value]
    for _ in range(levels + 1):
        containers = [each for each in inside if isinstance(each, dict | list)]
        if not containers:
            return False
        inside = [each for one in containers for each in (one.values() if isinstance(one, dict) else one)]
    return True


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _metadata(value: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(value).encode()) > _MAX_METADATA_BYTES:
        raise ValueError(f"expected at most {_MAX_METADATA_BYTES} bytes of JSON")
    return value


def _dhchap_key(value: str) -> str:
    if not is_dhchap_key(value):
        raise ValueError("expected a DH-HMAC-CHAP key as DHHC-1:00:BASE64: with its checksum")
    return value


Integer: TypeAlias = Annotated[int, BeforeValidator(_whole)]
Capacity: TypeAlias = Annotated[int | float, Field(ge=1, le=9007199254740991)]
"""Decimal GB."""
Uuid: TypeAlias = Annotated[str, Field(pattern=r"(?a)\A[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\Z")]
ObjectName: TypeAlias = Annotated[str, Field(pattern=r"(?a)\A(?!e_|d_)[\w+=-]*\Z")]
Names: TypeAlias = Annotated[list[str], Field(default_factory=list)]
Metadata: TypeAlias = Annotated[dict[str, Any], Field(default_factory=dict), AfterValidator(_metadata)]
Description: TypeAlias = Annotated[str, Field(max_length=1024)] | None
Priority: TypeAlias = Annotated[Integer, Field(ge=0, le=10)]
Passphrase: TypeAlias = Annotated[str, Field(pattern=r"\A.{8,4096}\Z")]
ReferenceId: TypeAlias = Annotated[str, Field(pattern=r"\A[a-z0-9-]{1,63}\Z")]


class RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel, regex_engine="python-re")

    @property
    def subject(self) -> tuple[str, str | None]:
        """Name and uuid of the volume, as the answer to an item begins."""
        raise NotImplementedError

    def given(self, *without: str) -> Document:
        """Return the fields that the request has, by their names in the API, without the named ones."""
        fields = type(self).model_fields
        return {str(fields[name].alias): getattr(self, name) for name in self.model_fields_set.difference(without)}


class Login(BaseModel):
    model_config = ConfigDict(strict=True)
    username: str
    password: str = Field(repr=False)


class Registration(RequestBody):
    """The key of a node."""

    client: str
    join_token: str = Field(repr=False)
    key: Annotated[str, Field(repr=False), AfterValidator(_dhchap_key)]


class _Named(RequestBody):
    id: str = Field(alias="_id")
    uuid: Uuid

    @property
    def subject(self) -> tuple[str, str | None]:
        return self.id, self.uuid


class _New(RequestBody):
    name: str

    @property
    def subject(self) -> tuple[str, str | None]:
        return self.name, None


class _Placement(RequestBody):
    """Restrictions of the drives that a volume uses."""

    disk_classes: Names
    server_classes: Names
    limit_by_disks: Names
    limit_by_nodes: Names
    vsgs: Names = Field(alias="VSGs")


class HeaderOptions(RequestBody):
    header_size: Annotated[Integer, Field(ge=1, le=100)] = 16


_LAYOUT = (
    "stripe_size", "stripe_width", "number_of_mirrors", "protection_level", "enable_crc_check",
    "data_blocks", "parity_blocks",
)  # fmt: skip
_ONLY_WITHOUT_GROUP = (
    "raid_level", "type", "encryption", "vsgs", "disk_classes", "server_classes", "limit_by_disks", "limit_by_nodes",
    "domain", *_LAYOUT,
)  # fmt: skip


class NewVolume(_New, _Placement):
    """An item of /volumes/save. The VPG, if there is one, decides the layout."""

    name: Annotated[ObjectName, Field(min_length=1, max_length=22)]
    capacity: Capacity
    vpg: Annotated[ObjectName, Field(max_length=100)] = Field(default="", alias="VPG")
    description: Description = None
    metadata: Metadata
    is_read_only: bool = False
    relative_rebuild_priority: Priority = 0
    allow_allocation_on_offline_drives: bool = False
    is_encrypted: bool = False
    raid_level: str = Field(default="", alias="RAIDLevel")
    type: str = ""
    encryption: HeaderOptions = HeaderOptions()
    domain: str | None = None
    stripe_size: Annotated[Integer, Field(ge=32)] = 32
    stripe_width: Annotated[Integer, Field(ge=1, le=300)] = 2
    number_of_mirrors: Annotated[Integer, Field(ge=1, le=2)] = 1
    protection_level: Literal["Full Separation", "Minimal Separation", "Ignore Separation"] = "Full Separation"
    enable_crc_check: bool = False
    data_blocks: Annotated[Integer, Field(ge=1, le=10)] = 8
    parity_blocks: Annotated[Integer, Field(ge=1, le=2)] = 2

    def has(self, field: str) -> bool:
        return field in self.model_fields_set

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.vpg:
            self._refuse(_ONLY_WITHOUT_GROUP)
        elif not self.has("raid_level"):
            raise ValueError("expected RAIDLevel or VPG")
        elif self.raid_level in PARAMETERS:
            self._check_layout()
        if (self.limit_by_nodes or self.limit_by_disks) and (self.disk_classes or self.server_classes):
            raise ValueError("expected classes or limits, got both")
        return self

    def _refuse(self, names: Iterable[str]) -> None:
        for name in names:
            if self.has(name):
                raise ValueError(f'Error: Invalid property: "{type(self).model_fields[name].alias}"')

    def _check_layout(self) -> None:
        level = self.raid_level
        self._refuse(name for name in _LAYOUT if self.has(name) and to_camel(name) not in PARAMETERS[level])
        if self.has("stripe_width") and (self.stripe_width != 1 if level == EC else self.stripe_width < 2):
            raise ValueError(f"stripeWidth: expected {'1' if level == EC else 'at least 2'}, got {self.stripe_width}")

    def stored(self) -> Document:
        return self.given("name", "capacity", "vpg", "raid_level", "is_encrypted", "encryption", "source", *_LAYOUT)

    def layout(self) -> Layout:
        """Return the requested layout, with the API's defaults; the RAID level must be a known one."""
        names = PARAMETERS[self.raid_level]
        coded = "dataBlocks" in names
        return Layout(
            self.raid_level,
            stripe_size=self.stripe_size,
            stripe_width=1 if self.raid_level in (CONCATENATED, RAID_1, EC) else self.stripe_width,
            mirrors=self.number_of_mirrors if "numberOfMirrors" in names else 0,
            data_blocks=self.data_blocks if coded else 1,
            parity_blocks=self.parity_blocks if coded else 0,
            protection=self.protection_level if "protectionLevel" in names else None,
            crc=(self.enable_crc_check if self.has("enable_crc_check") else coded)
            if "enableCrcCheck" in names
            else None,
        )


class Extension(_Named):
    """An item of /volumes/extend."""

    capacity: Capacity
    allow_allocation_on_offline_drives: bool = False


class VolumeUpdate(_Named, _Placement):
    """An item of /volumes/update: fields that the request lacks stay as they are."""

    description: Description = None
    metadata: Metadata
    is_read_only: bool = False
    relative_rebuild_priority: Priority = 0
    allow_allocation_on_offline_drives: bool = False
    enable_crc_check: bool = False


class Deletion(_Named):
    """An item of /volumes/delete."""


class SourceVolume(_Named):
    """The volume that is cut."""


class CloneSource(SourceVolume):
    """The snapshot or volume that a volume is made from."""

    kind: Literal["snapshot", "volume"]


class NewClone(NewVolume):
    """An item of /clones/save."""

    source: CloneSource


class NewSnapshot(_New):
    """An item of /snapshots/save."""

    name: Annotated[ObjectName, Field(min_length=1, max_length=64)]
    volume: SourceVolume
    metadata: Metadata


class NewSnapshotGroup(_New):
    """An item of /snapshotGroups/save."""

    name: Annotated[ObjectName, Field(min_length=1, max_length=64)]
    metadata: Metadata
    members: Annotated[list[NewSnapshot], Field(min_length=1, max_length=256)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        names, volumes = {each.name for each in self.members}, {each.volume.uuid for each in self.members}
        if min(len(names), len(volumes)) < len(self.members):
            raise ValueError("expected each snapshot and each volume once")
        return self


class SnapshotDeletion(_Named):
    """An item of /snapshots/delete or /snapshotGroups/delete."""


class ChangesQuery(BaseModel):
    """The query of /snapshots/changes/:name. `base`, `base_uuid`: the earlier snapshot; none = all data."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, regex_engine="python-re")

    uuid: Uuid
    base: str = ""
    base_uuid: Uuid | None = None
    offset: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] = 0
    count: Annotated[int, Field(ge=1, le=4096)] = 4096

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        if bool(self.base) != (self.base_uuid is not None):
            raise ValueError("expected base and baseUuid together")
        return self


class SpaceReclaim(_Named):
    """An item of /volumes/reclaimSpace. `offset`: where to go on, as the answer to the request before says."""

    offset: Annotated[int, Field(ge=0, le=(1 << 63) - 1)] = 0


class EncryptionInit(_Named):
    """An item of /volumes/initEncryption."""

    passphrase: Passphrase = Field(repr=False)
    slot: Annotated[Integer, Field(ge=1, le=32)] = 1
    """Counted from 1."""
    key_size: Annotated[Literal[256, 512], BeforeValidator(_whole)] = 512


class ReservationRequest(RequestBody):
    mode: Literal["SHARED_READ_ONLY", "SHARED_READ_WRITE", "EXCLUSIVE_READ_WRITE"] = "SHARED_READ_WRITE"
    version: Integer = 0
    """The present version of the volume's reservation; it counts from 1."""
    preempt: bool = False
    is_detach_others: bool = False


class _VolumeOfClient(RequestBody):
    name: str
    uuid: Uuid
    reference_id: ReferenceId = Field(default="", alias="referenceID")

    @property
    def subject(self) -> tuple[str, str | None]:
        return self.name, self.uuid

    @property
    def reference(self) -> str:
        return self.reference_id or self.uuid


class AttachedVolume(_VolumeOfClient):
    reservation: ReservationRequest = ReservationRequest()


class DetachedVolume(_VolumeOfClient):
    force: bool = False


class AttachRequest(RequestBody):
    client: str
    client_uuid: Uuid = Field(alias="clientUUID")
    volumes: Annotated[list[AttachedVolume], Field(min_length=1)]


class DetachRequest(RequestBody):
    client: str
    client_uuid: Uuid = Field(alias="clientUUID")
    force: bool = False
    volumes: Annotated[list[DetachedVolume], Field(min_length=1)]
