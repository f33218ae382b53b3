"""The routes of the endpoint: OpenAI's chat completions, completions and models.

What OpenAI's API has and this hasn't is refused by name; nothing that a request says is ignored.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from .answering import Answering, Prepared, Preparing
from .bodies import ChatBody, CompletionBody, GenerationBody
from .choices import Choice, Piece
from .engine import TextEngine
from .errors import ApiError, add_error_handlers, as_api_error, json_response
from .gate import Gate, Receive, Scope, Send, unless_disconnected
from .metrics import CONTENT_TYPE, Metrics
from .replies import ChatReply, Document, Reply, TextReply, quality, usage
from .settings import Settings

_CLIENT_GONE = 499
"""Nginx's status of a request whose client didn't wait; nobody reads it."""


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What every error looks like."""

    error: ErrorBody


class ModelList(BaseModel):
    """The models that there are: one."""

    object: str
    data: list[Model]


def make_app(engine: TextEngine, tokenizer: Any, settings: Settings) -> Gate:
    """Return the endpoint as an ASGI application; whoever runs it owns the engine."""
    endpoint = _Endpoint(engine, tokenizer, settings)
    app = FastAPI(title="Tierhints", docs_url=None, redoc_url=None)
    add_error_handlers(app)
    statuses = (400, 401, 404, 408, 413, 429, 500, 503)
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorReply} for status in statuses}
    errors[422] = {"model": ErrorReply, "description": "Not used: 400 is."}

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=errors)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await endpoint.chat(body, request)

    @app.post("/v1/completions", response_model=Completion, responses=errors)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await endpoint.text(body, request)

    @app.get("/v1/models", response_model=ModelList, responses=errors)
    async def models() -> Response:
        return json_response({"object": "list", "data": [endpoint.model()]})

    @app.get("/v1/models/{name:path}", response_model=Model, responses=errors)
    async def model(name: str) -> Response:
        endpoint.check_model(name)
        return json_response(endpoint.model())

    @app.get("/health")
    async def health(response: Response) -> dict[str, str]:
        if not engine.is_alive:
            response.status_code = 503
            return {"status": "stopped"}
        return {"status": "draining" if gate.draining else "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        page = await asyncio.to_thread(endpoint.metrics.page)
        return Response(page, media_type=CONTENT_TYPE)

    for schema in app.openapi()["components"]["schemas"].values():
        if "model" in schema["properties"] and "stream" in schema["properties"]:
            schema["properties"]["model"]["enum"] = [settings.model.name]
    gate = Gate(app, api_key=settings.api_key, max_body_bytes=settings.max_body_bytes)
    return gate


class _Endpoint:
    """Answers bodies that are read."""

    def __init__(self, engine: TextEngine, tokenizer: Any, settings: Settings) -> None:
        self.metrics = Metrics(engine)
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._preparing = Preparing(engine, tokenizer, settings)
        self._preparer = ThreadPoolExecutor(1, thread_name_prefix="prompts")
        self._created = int(time.time())

    def model(self) -> Document:
        """Return the model as a document."""
        model = Model(
            id=self._settings.model.name,
            created=self._created,
            object="model",
            owned_by="tierhints",
        )
        return model.model_dump(exclude_unset=True)

    def check_model(self, name: str) -> None:
        """Raise ApiError where the model is another one."""
        if name != self._settings.model.name:
            raise ApiError(
                404,
                f"there is no model {name!r} here: it is {self._settings.model.name!r}",
                param="model",
                code="model_not_found",
            )

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a chat."""
        reply = ChatReply(body.model, self._tokenizer)
        return await self._answer(body, partial(self._preparing.chat, body), reply, request)

    async def text(self, body: CompletionBody, request: Request) -> Response:
        """Continue texts."""
        reply = TextReply(body.model, self._tokenizer)
        return await self._answer(body, partial(self._preparing.text, body), reply, request)

    async def _answer(
        self,
        body: GenerationBody,
        prepare: Callable[[], list[Prepared]],
        reply: Reply,
        request: Request,
    ) -> Response:
        watch = _Watch(self.metrics)
        try:
            self.check_model(body.model)
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._preparer, prepare)
            answering = Answering(self._engine, prepared)
            answering.start()
        except Exception as error:
            raise self._failure(error, watch) from error
        if body.stream:
            chunks = self._stream(answering, reply, watch, with_usage=body.include_usage)
            return _EventStream(chunks, answering, watch)
        try:
            whole = self._whole(answering, reply, watch)
            document = await unless_disconnected(whole, request.receive)
        except Exception as error:
            raise self._failure(error, watch) from error
        finally:
            answering.close()
            watch.close()
        return json_response(document, _CLIENT_GONE if document is None else 200)

    async def _whole(self, answering: Answering, reply: Reply, watch: "_Watch") -> Document:
        pieces: list[list[Piece]] = [[] for _ in answering.choices]
        async for choice, piece in answering.pieces():
            watch.see(choice)
            pieces[choice.index].append(piece)
        watch.done("answered")
        return reply.whole(answering.choices, pieces)

    async def _stream(
        self, answering: Answering, reply: Reply, watch: "_Watch", *, with_usage: bool
    ) -> AsyncIterator[str]:
        """Give the events of a stream; what goes wrong is one, too."""
        unused = {"usage": None} if with_usage else {}
        choices = answering.choices
        try:
            for choice in choices:
                if (opening := reply.opening(choice)) is not None:
                    yield _event({**reply.chunk([opening]), **unused})
            open_choices = len(choices)
            async for choice, piece in answering.pieces():
                watch.see(choice)
                if piece:
                    yield _event({**reply.chunk([reply.piece(choice, piece)]), **unused})
                if choice.finish_reason is None:
                    continue
                open_choices -= 1
                chunk = {**reply.chunk([reply.end(choice)]), **unused}
                if not open_choices and not with_usage:
                    chunk["quality"] = quality(choices)
                yield _event(chunk)
            if with_usage:
                used = usage(choices).model_dump(mode="json", exclude_unset=True)
                yield _event({**reply.chunk([]), "usage": used, "quality": quality(choices)})
            watch.done("answered")
        except Exception as error:
            yield _event(self._failure(error, watch).body)
        yield "data: [DONE]\n\n"

    def _failure(self, error: Exception, watch: "_Watch") -> ApiError:
        """Return what the client is told, and count it."""
        failure = as_api_error(error, retry_seconds=self._settings.retry_seconds)
        watch.done(failure.body["error"]["code"] or str(failure.status))
        return failure


class _Watch:
    """Times and counts one request; one of which nothing is known at its end was left."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._first = True
        self._outcome = ""

    def see(self, choice: Choice) -> None:
        """Take note of a piece of an answer."""
        seconds = time.perf_counter() - self._start
        if self._first and choice.new_tokens:
            self._first = False
            self._metrics.first_token_seconds.observe(seconds)
        if choice.outcome is not None:
            self._metrics.count(choice.outcome, new_tokens=choice.new_tokens)

    def done(self, outcome: str) -> None:
        """Take note of what became of it."""
        self._outcome = outcome
        self._metrics.requests.labels(outcome).inc()
        if outcome == "answered":
            self._metrics.seconds.observe(time.perf_counter() - self._start)

    def close(self) -> None:
        """Count what nothing became of: the client has gone."""
        if not self._outcome:
            self.done("disconnected")


class _EventStream(StreamingResponse):
    """Server-sent events, until they are all sent or the client has gone."""

    def __init__(self, events: AsyncIterator[str], answering: Answering, watch: _Watch) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answering = answering
        self._watch = watch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(OSError):  # the connection is closed
                await unless_disconnected(self.stream_response(send), receive)
        finally:
            self._answering.close()
            self._watch.close()


def _event(document: Document) -> str:
    return f"data: {json.dumps(document, allow_nan=False)}\n\n"
