"""Errors in the shape of OpenAI's API: ``{"error": {message, type, param, code}}``."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as HTTPError

from ..errors import InputError, PlacementError
from ..progressive.bounds import RequestError
from .bodies import INERT

_LOG = logging.getLogger("tierhints.serving")
_TYPE_NAMES = {"body", "str", "int", "float", "bool", "none", "literal"}
_LATER = {"queue_full": 429, "closed": 503}
"""Codes of the engine -> statuses of what may be asked again."""
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client is told: its status, and what the body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """Return it as a response."""
        return json_response(self.body, self.status, self.headers)


def json_response(
    document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a document as ASCII JSON: text of clients may have halves of characters."""
    content = json.dumps(document, allow_nan=False)
    return Response(content, status, dict(headers or {}), media_type="application/json")


def as_api_error(error: BaseException, *, retry_seconds: int = 1) -> ApiError:
    """Return what a client is told of an exception. A RequestError describes what was asked; every
    other is the server's own fault, and goes to its log.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        status = _LATER.get(error.code or "", 400)
        headers = {"Retry-After": str(retry_seconds)} if status in _LATER.values() else {}
        return ApiError(status, str(error), param=error.param, code=error.code, headers=headers)
    _LOG.error("a request failed", exc_info=error)
    if isinstance(error, InputError | PlacementError | OSError | MemoryError):
        return ApiError(500, f"{type(error).__name__}: {error}", code="engine_failure")
    return ApiError(500, "the server failed at this request: its log says why")


def add_error_handlers(app: Starlette) -> None:
    """Answer every exception of an app in that shape."""

    async def known(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPError)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response()

    for kind in (ApiError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPError, http)
    app.add_exception_handler(RequestValidationError, invalid)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return the error of what pydantic found: of the first field, what is said most closely."""
    found = [(_path(error["loc"]), error) for error in errors]
    param = next(iter(found[0][0]), None)
    own = [each for each in found if next(iter(each[0]), None) == param]
    path, error = max(own, key=lambda each: len(each[0]))
    name, kind = ".".join(path) or "the body", error["type"]
    if kind == "json_invalid":
        detail = error.get("ctx", {}).get("error", "it can't be parsed")
        return ApiError(400, f"the body is not JSON ({detail}): send a JSON object")
    code = "invalid_value"
    if kind == "extra_forbidden":
        message, code = f"{name} is not supported: leave it out", "unsupported_parameter"
    elif param in INERT:
        message, code = f"{name} is not supported: {INERT[param]}", "unsupported_parameter"
    elif kind == "missing":
        message, code = f"{name} is missing: give it", "missing_required_parameter"
    else:
        message = f"{name}: {str(error['msg']).removeprefix('Value error, ')}"
    return ApiError(400, message, param=param, code=code)


def _path(loc: Sequence[str | int]) -> list[str]:
    """Return the names of the fields on the way to an error; pydantic has those of types, too."""
    return [
        str(part)
        for part in loc
        if isinstance(part, int) or (re.fullmatch("[a-z_]+", part) and part not in _TYPE_NAMES)
    ]
