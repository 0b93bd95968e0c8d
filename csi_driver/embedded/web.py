"""The API over HTTP: sessions, statuses, envelopes and the OpenAPI document. What the routes do is in `api`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request, Response

from csi_driver.embedded import schemas
from csi_driver.embedded.api import Api, Call, Route
from csi_driver.embedded.overview import API_VERSION
from csi_driver.embedded.query import QueryRefused
from csi_driver.embedded.refusals import Refusal, SchemaRefusal, envelope, refused_read
from csi_driver.embedded.sessions import Sessions
from csi_driver.embedded.validation import validate
from csi_driver.errors import DriverError

_log = logging.getLogger(__name__)

COOKIE = "connect.sid"
MOST_BODY_BYTES = 2 * 1024 * 1024
_MOST_LEVELS = 100
"""As deep as the server's own database takes a document; what is copied here is copied by recursion."""
_LIST_ERRORS = {"volumes": 16040, "clients": 16030}
_WITHOUT_NEW_PASSWORD = frozenset(("/users/changePassword", "/login/logout"))
_HTML = "<!DOCTYPE html><html><head><title>Error</title></head><body><pre>{}</pre></body></html>"

Endpoint = Callable[[Request], Awaitable[Response]]


class BadBody(Exception):
    """The body is no JSON, or too long."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def application(api: Api, sessions: Sessions, workers: ThreadPoolExecutor) -> FastAPI:
    """Return the web application. Work that may wait runs on `workers`."""
    app = FastAPI(
        title="Storage management",
        version=API_VERSION,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        description="The part of the NVMesh Management REST API that the embedded storage manager serves.",
    )
    door = _Door(sessions)
    app.add_api_route(
        "/login", door.login, methods=["POST"], summary="Open a session", openapi_extra=_body(schemas.LOGIN)
    )
    app.add_api_route("/login", door.please_log_in, methods=["GET"], summary="Where redirects end")
    app.add_api_route("/login/logout", door.log_out, methods=["GET"], summary="End the session")
    app.add_api_route("/login/inActivityThreshold", door.idle_limit, methods=["GET"], summary="Idle limit in ms")
    for route in api.routes():
        app.add_api_route(
            route.path,
            _endpoint(route, door, workers),
            methods=[route.method],
            summary=route.summary,
            openapi_extra=_body(route.schema) if route.schema is not None else None,
            operation_id=f"{route.method} {route.path}",
        )
    app.add_api_route("/openapi.json", door.behind_login(app.openapi), methods=["GET"], include_in_schema=False)
    for status in (404, 405):
        app.add_exception_handler(status, door.no_such_path)
    return app


def _body(schema: object) -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answer(content: object, status: int = 200) -> Response:
    """Return a JSON answer. The framework's own encoder is not used: it is slow on long lists."""
    return Response(json.dumps(content, separators=(",", ":")), status, media_type="application/json; charset=utf-8")


def page(status: int, message: str) -> Response:
    return Response(_HTML.format(message), status, media_type="text/html")


def redirect() -> Response:
    return Response(None, 302, {"Location": "/login"})


class _Door:
    """Who comes in: login, logout, and the check that every other route makes first."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    def refuses(self, request: Request) -> Response | None:
        """Return the answer for a caller that may not go on, None for one that may."""
        if not self._sessions.known(request.cookies.get(COOKIE)):
            return redirect()
        if self._sessions.must_change_password and request.url.path not in _WITHOUT_NEW_PASSWORD:
            return answer(refused_read(Refusal(1268, "Changing password is required")))
        return None

    def behind_login(self, content: Callable[[], object]) -> Endpoint:
        """Return the endpoint of a document that takes a session and nothing else."""

        async def endpoint(request: Request) -> Response:
            return self.refuses(request) or answer(content())

        return endpoint

    async def login(self, request: Request) -> Response:
        if "accept" not in request.headers:
            return answer({"error": "'Accept' header is not set"}, 406)
        try:
            fields = await _credentials(request)
        except BadBody as problem:
            return page(problem.status, str(problem))
        except SchemaRefusal as problem:
            return answer(problem.envelope(), 422)
        name = self._sessions.full_name(fields["username"])
        try:
            session = self._sessions.open(fields["username"], fields["password"])
        except DriverError as problem:
            _log.error("POST /login: %s", problem)
            return answer(failed(problem), 500)
        if session is None:
            return answer(envelope(name, None, False, "Wrong credentials"), 401)
        self._sessions.close(request.cookies.get(COOKIE))
        payload = {"message": "User logged in successfully", "id": 1265}
        response = answer(envelope(name, None, True, None, payload))
        response.set_cookie(COOKIE, session, path="/", httponly=True, samesite=None)
        return response

    async def please_log_in(self, request: Request) -> Response:
        return answer(refused_read(Refusal(1267, "Please login via the /login route.")))

    async def log_out(self, request: Request) -> Response:
        self._sessions.close(request.cookies.get(COOKIE))
        return redirect()

    async def idle_limit(self, request: Request) -> Response:
        return answer(int(self._sessions.idle_s * 1000))

    async def no_such_path(self, request: Request, problem: Exception) -> Response:
        return self.refuses(request) or answer({"success": False, "err": "404 (Not Found)"}, 404)


async def _credentials(request: Request) -> dict[str, str]:
    if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        body: object = dict(parse_qsl((await _bytes(request)).decode("utf-8", "replace")))
    else:
        body = await _json(request)
    validate(body, {**schemas.LOGIN, "additionalProperties": True})
    return cast("dict[str, str]", body)


async def _bytes(request: Request) -> bytes:
    """Return the body. Raises BadBody if it is too long; no more of it is read then."""
    length = request.headers.get("content-length", "0")
    parts: list[bytes] = []
    size = int(length) if length.isdigit() else 0
    if size <= MOST_BODY_BYTES:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > MOST_BODY_BYTES:
                break
    if size > MOST_BODY_BYTES:
        raise BadBody(413, "request entity too large")
    return b"".join(parts)


def _not_a_number(text: str) -> object:
    raise ValueError(f"{text} is no JSON")


async def _json(request: Request) -> object:
    body = await _bytes(request)
    if not body:
        return {}
    try:
        decoded: object = json.loads(body, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as problem:
        raise BadBody(400, "the body is no JSON") from problem
    if _is_deeper(decoded, _MOST_LEVELS):
        raise BadBody(400, f"the body is nested deeper than {_MOST_LEVELS} levels")
    return decoded


def _is_deeper(value: object, levels: int) -> bool:
    """Tell whether objects and arrays are nested deeper than that."""
    inside = [value]
    for _ in range(levels + 1):
        containers = [each for each in inside if isinstance(each, dict | list)]
        if not containers:
            return False
        inside = [each for one in containers for each in (one.values() if isinstance(one, dict) else one)]
    return True


def _endpoint(route: Route, door: _Door, workers: ThreadPoolExecutor) -> Endpoint:
    collection = route.path.split("/")[1]

    async def endpoint(request: Request) -> Response:
        refused = door.refuses(request)
        if refused is not None:
            return refused
        if "accept" not in request.headers:
            return page(500, "Internal Server Error")
        try:
            body = route.checked(await _json(request)) if route.method == "POST" else None
            call = Call(request.path_params, request.query_params, body)
            if route.quick:
                return perform(route, call, collection)
            return await asyncio.get_running_loop().run_in_executor(workers, perform, route, call, collection)
        except BadBody as problem:
            return page(problem.status, str(problem))
        except SchemaRefusal as problem:
            return answer(problem.envelope(), 422)

    return endpoint


def perform(route: Route, call: Call, collection: str) -> Response:
    """Do what a route does and return its answer. Raises SchemaRefusal."""
    try:
        return answer(route.handler(call))
    except Refusal as refusal:
        return answer(refused_read(refusal))
    except QueryRefused as problem:
        return answer(_query_refused(problem, collection))
    except SchemaRefusal:
        raise
    except (DriverError, OSError) as problem:
        _log.error("%s %s: %s", route.method, route.path, problem)
        return answer(failed(problem), 500)


def failed(problem: Exception) -> object:
    """Return the envelope of a request that this machine kept from being carried out."""
    return envelope(None, None, False, {"message": str(problem), "id": 500})


def _query_refused(problem: QueryRefused, collection: str) -> object:
    if problem.mixed:
        inner = {"systemMessage": {"message": str(problem), "id": 16272}, "additionalInfo": {}}
        return envelope(None, None, False, inner)
    number = _LIST_ERRORS.get(collection, 16040)
    return envelope(
        None, None, False, {"message": "The list could not be loaded", "id": number, "innerMessage": str(problem)}
    )
