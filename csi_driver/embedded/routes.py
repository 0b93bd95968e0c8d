# SPDX-License-Identifier: Apache-2.0
"""Routes of the REST API: from a request to a function of the API, and from its result or error to an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError, conlist

from csi_driver.embedded.documents import ApiError, InvalidQuery, Query, QueryRefused, envelope, failure
from csi_driver.embedded.model import Document, compact_json
from csi_driver.embedded.requests import RequestBody, Unusable, read_body
from csi_driver.http_requests import HttpRequest, HttpResponse

_log = logging.getLogger(__name__)

_LIST_ERRORS = {"volumes": 16040, "clients": 16030}

T = TypeVar("T")
_Body = TypeVar("_Body")
Item = TypeVar("Item", bound=RequestBody)
State: TypeAlias = Mapping[str, Document | None] | None
"""The documents of a volume and a client after a change of them; a volume that is gone is None."""
Route: TypeAlias = Callable[[HttpRequest, list[str]], str]
"""Takes the parts of the path at the asterisks too, and returns JSON."""


def answer(content: object, status: int = 200) -> HttpResponse:
    return answer_text(compact_json(content), status)


def answer_text(json: str, status: int = 200) -> HttpResponse:
    return HttpResponse(status, json.encode(), (("Content-Type", "application/json; charset=utf-8"),))


UNEXPECTED = answer(failure(500, "internal error; the log has the details"), 500)


def get(act: Callable[..., T], text: Callable[[T], str] = compact_json) -> Route:
    """Return the route of a function of the path's parts."""
    return lambda _, parts: text(act(*parts))


def listing(texts: Callable[[Query], Iterable[str]]) -> Route:
    return lambda request, parts: f"[{','.join(texts(Query.parse(request.query, *parts)))}]"


def selected(all_of: Callable[[], Iterable[Document]], text: Callable[[Document], str] = compact_json) -> Route:
    return listing(lambda query: map(text, query.select(all_of())))


def post(kind: type[_Body], act: Callable[[_Body], object]) -> Route:
    adapter = TypeAdapter(kind)
    return lambda request, _: compact_json(act(adapter.validate_python(read_body(request))))


def each(kind: type[Item], act: Callable[[Item], State]) -> Route:
    """Return the route of a list of requests, each of which is carried out and answered with an envelope."""
    return post(conlist(kind, min_length=1), lambda items: [outcome(item, act) for item in items])


def outcome(item: Item, act: Callable[[Item], State]) -> Document:
    """Return the envelope of an item. Its payload has the state after it; NVMesh's is null, so clients must read it."""
    name, identity = item.subject
    try:
        payload = act(item)
    except ApiError as refusal:
        return envelope(name, identity, False, refusal.error)
    created = next(iter(payload.values())) if payload is not None and identity is None else None
    return envelope(name, str(created["uuid"]) if created is not None else identity, True, payload=payload)


def refused_answer(request: HttpRequest, error: Exception) -> HttpResponse:
    """Return the answer to a request that failed as a whole."""
    match error:
        case Unusable():
            return answer(failure(error.status, str(error)), error.status)
        case ValidationError():
            # Without the values, which may be passphrases.
            reasons = error.errors(include_url=False, include_context=False, include_input=False)
            return _invalid("; ".join(f"data/{'/'.join(map(str, each['loc']))}: {each['msg']}" for each in reasons))
        case InvalidQuery():
            return _invalid(str(error))
        case QueryRefused():
            number = _LIST_ERRORS.get(request.path.split("/")[1], 16040)
            return answer(failure(number, "The list could not be loaded", innerMessage=str(error)))
        case ApiError():
            return answer(envelope(None, None, False, error.error))
    _log.error("%s %s: %s", request.method, request.path, error)
    return answer(failure(500, str(error)), 500)


def _invalid(reason: str) -> HttpResponse:
    return answer(failure(422, "REST API Validation Error", innerMessage=reason), 422)
