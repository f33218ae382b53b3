"""What a request passes before anything reads it: is the server open, is the key right, is the body
small enough.
"""

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from .errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")
_BODY_SECONDS = 30.0


class Gate:
    """An ASGI application around another one. Bodies are read whole here, within a time."""

    def __init__(self, app: App, *, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._max_body_bytes = max_body_bytes
        self.draining = False
        """Whether new requests are turned away."""
        self.active = 0
        """Requests to the API on their way."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request pass, or answer it."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            replayed = await self._read(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self.active += 1
        try:
            await self._app(scope, replayed, send)
        finally:
            self.active -= 1

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._key is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            right = hmac.compare_digest(given.strip(), self._key)
            if scheme.lower() != b"bearer" or not right:
                raise ApiError(
                    401,
                    "the API key is missing or wrong: send Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if self.draining:
            raise ApiError(
                503,
                "the server shuts down: ask another one",
                code="shutdown",
                headers={"Retry-After": "5", "Connection": "close"},
            )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise self._too_large()

    async def _read(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body; returns what gives it again, and after it whatever comes."""
        if scope["method"] in ("GET", "HEAD"):
            return receive
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(
                408, "the body took too long", code="timeout", headers={"Connection": "close"}
            ) from None
        pending = [message if message["type"] == "http.disconnect" else _body_message(bytes(body))]

        async def replay() -> MutableMapping[str, Any]:
            return pending.pop() if pending else await receive()

        return replay

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body_bytes} bytes: send less",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def _body_message(body: bytes) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": False}


async def until_disconnected(receive: Receive) -> None:
    """Return once the client has gone; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(work: Awaitable[Result], receive: Receive) -> Result | None:
    """Await some work; where the client goes meanwhile, end the work and return None."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each
