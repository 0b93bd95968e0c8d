"""What the API says no to: the ids of the management's messages, and the envelope they travel in."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from csi_driver.errors import DriverError

Document = dict[str, object]


class Refusal(DriverError):
    """A business failure. It travels as HTTP 200 with `success: false` and `error.id`."""

    def __init__(
        self,
        number: int,
        message: str,
        keys: Mapping[str, object] | None = None,
        inner: object = None,
        *,
        loses_uuid: bool = False,
    ) -> None:
        self.number = number
        self.message = message
        self.keys = dict(keys or {})
        self.inner = inner
        self.loses_uuid = loses_uuid
        """The API names the volume's uuid "undefined" in some refusals."""
        super().__init__(f"{number}: {message}")


def detail(number: int, message: str, **keys: object) -> Document:
    """Return an `innerMessage` object."""
    return {"message": message, "id": number, **keys}


def envelope(
    key: str | None, identity: str | None, success: bool, error: object = None, payload: object = None
) -> Document:
    """Return the five keys that every answer of the API but lists and documents has."""
    return {"_id": key, "uuid": identity, "success": success, "error": error, "payload": payload}


def refused_item(key: str | None, identity: str | None, refusal: Refusal) -> Document:
    """Return the envelope of one refused object of a mutating call."""
    error: Document = {"message": refusal.message, "id": refusal.number, **refusal.keys}
    if refusal.loses_uuid:
        identity = "undefined"
        if "volumeUUID" in error:
            error["volumeUUID"] = "undefined"
    error["ApiRequestUUID"] = str(uuid.uuid1())
    if refusal.inner is not None:
        error["innerMessage"] = refusal.inner
    return envelope(key, identity, False, error)


def refused_read(refusal: Refusal) -> Document:
    """Return the envelope of a refused read."""
    return envelope(None, None, False, {"message": refusal.message, "id": refusal.number, **refusal.keys})


class SchemaRefusal(DriverError):
    """The request does not fit the schema of its route: HTTP 422 for the whole of it."""

    def __init__(self, detail: str) -> None:
        self.detail = detail
        super().__init__(detail)

    def envelope(self) -> Document:
        return envelope(
            None, None, False, {"message": "REST API Validation Error", "id": 422, "innerMessage": self.detail}
        )


VOLUME_NOT_FOUND = 1543
CLIENT_NOT_FOUND = 1608
GROUP_NOT_FOUND = 16220


def volume_not_found(name: str, identity: str) -> Refusal:
    return Refusal(VOLUME_NOT_FOUND, "Volume not found", {"volumeID": name, "volumeUUID": identity})
