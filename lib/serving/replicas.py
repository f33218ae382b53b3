"""The endpoint on Ray Serve: replicas, each a whole endpoint of its own, and an entrance that hands
each request to one of them, as it came, and what is answered back to the client.

Which one it is says a request router of Ray Serve (``PrefixRouter``). Ray's own for this,
PrefixCacheAffinityRouter, can't be imported without vLLM or SGLang (Ray 2.60).
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from .beginnings import Beginnings, digest_beginnings
from .errors import ApiError, add_error_handlers, as_api_error
from .gate import Gate, Receive, Scope, Send, unless_disconnected
from .metrics import CONTENT_TYPE, join_pages
from .serve import Endpoint
from .settings import Access

Message = MutableMapping[str, Any]
OpenEndpoint = Callable[[], AbstractContextManager[Endpoint]]
"""Opens an endpoint; can be pickled."""
_SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string")
"""What of a scope goes to a replica, beside its headers."""
_ASK_SECONDS = 10.0
"""For a page of each replica."""
_LATE_SECONDS = 30.0
"""Beyond a request's time, until it is ended from here: its replica ends it before."""
_ONGOING = 100_000
"""Requests to a replica at a time; the engine has a queue, and says when that is full."""
_STOP_SECONDS = 1.0
"""For what is on its way where Ray ends a replica."""


class PrefixRouter(RequestRouter):
    """Sends requests that begin alike to the replica where the first of them went."""

    def initialize_state(self, **_: Any) -> None:
        """Start without any; called by Ray Serve."""
        self._beginnings: Beginnings[Any] = Beginnings()
        # Ray's own figures are forgotten ten seconds after they changed; requests take longer.
        self._ongoing: Counter[Any] = Counter()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replica for a request, and the others where it can't take it."""
        if not candidate_replicas:
            return []
        digests: Sequence[int] = ()
        if pending_request is not None:
            digests = pending_request.kwargs.get("beginnings", ())
            pending_request.routing_context.should_backoff = True
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        chosen = self._beginnings.choose(digests, {name: self._ongoing[name] for name in replicas})
        first = replicas.pop(chosen)
        return [[first], list(replicas.values())]

    def on_send_request(self, replica_id: Any) -> None:
        """Count a request; called by Ray Serve."""
        super().on_send_request(replica_id)
        self._ongoing[replica_id] += 1

    def on_request_completed(self, replica_id: Any, internal_request_id: str) -> None:
        """Count one that has ended, or could not be sent; called by Ray Serve."""
        super().on_request_completed(replica_id, internal_request_id)
        self._ongoing[replica_id] = max(0, self._ongoing[replica_id] - 1)


class Replica:
    """An endpoint in a process of its own. Ray Serve ends and replaces one that isn't healthy."""

    def __init__(self, open_endpoint: OpenEndpoint) -> None:
        self._open = contextlib.ExitStack()
        endpoint = self._open.enter_context(open_endpoint())
        self._app = endpoint.gate
        self._document = endpoint.document

    def describe(self) -> Mapping[str, Any]:
        """Return what the endpoint says of itself."""
        return self._document

    async def answer(
        self, scope: Scope, body: bytes, beginnings: Sequence[int] = ()
    ) -> AsyncIterator[Message]:
        """Answer a request with the messages of ASGI; ``beginnings`` is for the router."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        bodies = [body]

        async def receive() -> Message:
            if not bodies:
                await asyncio.Event().wait()  # where the client goes, this is cancelled
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}

        running = asyncio.ensure_future(self._app(scope, receive, messages.put))
        running.add_done_callback(lambda _: messages.put_nowait(None))
        answered = False
        try:
            while (message := await messages.get()) is not None:
                yield message
                answered = True
            if not answered:
                await running  # raises why
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await running

    async def get(self, path: str) -> tuple[str, int, bytes]:
        """Return the replica's name, and the status and the body of a page."""
        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
        start, *parts = [message async for message in self.answer(scope, b"")]
        name = serve.get_replica_context().replica_id.unique_id
        return name, start["status"], b"".join(part.get("body", b"") for part in parts)

    async def check_health(self) -> None:
        """Raise where the engine has stopped; called by Ray Serve."""
        _, status, body = await self.get("/health")
        if status != 200:
            raise RuntimeError(body.decode())

    def __del__(self) -> None:
        """Close the endpoint; called by Ray Serve."""
        self._open.close()


class Entrance:
    """What clients reach: it looks at their keys and the size of their bodies, and passes on."""

    def __init__(self, replicas: Any, access: Access) -> None:
        self._replicas = replicas
        self._answers = replicas.options(method_name="answer", stream=True)
        self._seconds = access.max_seconds + _LATE_SECONDS
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Mount("/", self._pass_on),
            ]
        )
        add_error_handlers(app)
        self._gate = Gate(app, api_key=access.api_key, max_body_bytes=access.max_body_bytes)

    def __serve_build_asgi_app__(self) -> Gate:
        """Return the application; called by Ray Serve."""
        return self._gate

    async def describe(self) -> Mapping[str, Any]:
        """Return what an endpoint says of itself."""
        document: Mapping[str, Any] = await self._replicas.describe.remote()
        return document

    def drain(self) -> None:
        """Turn new requests away from now on."""
        self._gate.draining = True

    def active(self) -> int:
        """Return how many requests are on their way."""
        return self._gate.active

    async def _health(self, request: Request) -> Response:
        pages = await self._ask_all("/health")
        healthy = sum(status == 200 for _, status, _ in pages)
        status = "draining" if self._gate.draining else "ok"
        document = {"status": status if healthy else "stopped", "replicas": healthy}
        return JSONResponse(document, 200 if healthy else 503)

    async def _metrics(self, request: Request) -> Response:
        pages = {name: page for name, _, page in await self._ask_all("/metrics")}
        return Response(join_pages(pages, label="replica"), media_type=CONTENT_TYPE)

    async def _ask_all(self, path: str) -> list[tuple[str, int, bytes]]:
        """Return a page of each replica that answers."""
        asked = self._replicas.broadcast("get", path)
        try:
            replies = await asked.results_async(timeout_s=_ASK_SECONDS, return_exceptions=True)
        except (RayServeException, TimeoutError):  # there are none, or one hangs
            return []
        return [reply for reply in replies if not isinstance(reply, BaseException)]

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Have a replica answer. Where it dies, the client is told so."""
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        # The gate has read the body of what is for the API; others have none.
        reads = scope["path"].startswith("/v1") and scope["method"] not in ("GET", "HEAD")
        body = (await receive()).get("body", b"") if reads else b""
        sent = {name: scope[name] for name in _SCOPE if name in scope}
        sent["headers"] = [tuple(header) for header in scope["headers"]]
        answer = self._answers.remote(scope=sent, body=body, beginnings=digest_beginnings(body))
        start: Message | None = None

        async def pass_on() -> None:
            nonlocal start
            async with asyncio.timeout(self._seconds):
                async for message in answer:
                    start = start or message
                    await send(message)

        try:
            await unless_disconnected(pass_on(), receive)
        except Exception as error:
            failure = _failure(error)
            if start is None:
                await failure.response()(scope, receive, send)
            elif dict(start["headers"])[b"content-type"].startswith(b"text/event-stream"):
                event = f"data: {json.dumps(failure.body)}\n\ndata: [DONE]\n\n"
                await send({"type": "http.response.body", "body": event.encode()})
            else:
                raise
        finally:
            answer.cancel()


def _failure(error: Exception) -> ApiError:
    as_api_error(error)  # to the log
    return ApiError(
        503,
        f"the replica has gone, or none answered in time ({type(error).__name__}): ask again",
        code="replica_failed",
        headers={"Retry-After": "1"},
    )


def make_application(
    open_endpoint: OpenEndpoint,
    access: Access,
    *,
    replicas: int,
    replica_cpus: int,
    logging_config: Mapping[str, Any],
) -> Any:
    """Return what ``serve.run`` deploys: so many replicas, with so many CPUs each, and one
    entrance.
    """
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": _STOP_SECONDS,
        "max_ongoing_requests": _ONGOING,
        "logging_config": dict(logging_config),
    }
    replica = serve.deployment(
        Replica,
        name="Replica",
        num_replicas=replicas,
        max_constructor_retry_count=1,  # until one has started; then as often as need be
        ray_actor_options={"num_cpus": replica_cpus},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
        **options,
    )
    entrance = serve.deployment(
        serve.ingress()(Entrance),
        name="Entrance",
        ray_actor_options={"num_cpus": 0},
        **options,
    )
    return entrance.bind(replica.bind(open_endpoint), access)
