"""From a body to the requests of an engine, and their events on the event loop."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..progressive.bounds import RequestError
from ..progressive.generation import Constraint, Event, GenerationRequest, Outcome, Sampling
from .bodies import ChatBody, CompletionBody, GenerationBody
from .choices import Choice, Piece
from .engine import TextEngine
from .grammar import ANY_OBJECT, Grammars
from .prompts import Prompts
from .settings import Settings
from .tools import HERMES, CallReader, PlainReader, Reader, TemplateReader

_LEGACY_TOKENS = 16
"""What completions write where max_tokens isn't given, as OpenAI's API says."""


class Prepared(NamedTuple):
    """A request of the engine, and what reads its answer."""

    request: GenerationRequest
    choice: Choice


class Preparing:
    """Makes requests of bodies; blocks, and is to be used by one thread at a time."""

    def __init__(self, engine: TextEngine, tokenizer: Any, settings: Settings) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._settings = settings
        self._prompts = Prompts(tokenizer, vocab_size=settings.model.vocab_size)
        self._grammars = Grammars(
            tokenizer,
            vocab_size=settings.model.vocab_size,
            stop_ids=sorted(settings.model.stop_ids),
        )

    def chat(self, body: ChatBody) -> list[Prepared]:
        """Return the requests of a chat, one for each choice; raises RequestError."""
        prompt = self._prompts.chat(body)
        top = (body.top_logprobs or 0) if body.logprobs else 0
        limit = body.max_completion_tokens or body.max_tokens
        template = self._template(body)
        tools = [tool.model_dump(exclude_none=True) for tool in body.active_tools]
        prepared = []
        for index in range(self._num_choices(body, 1)):
            reader: Reader = PlainReader()
            if body.must_call:
                reader = CallReader()
            elif template is not None:
                reader = TemplateReader(self._tokenizer, template, prompt=prompt, tools=tools)
            choice = Choice(
                index,
                self._tokenizer,
                prompt=prompt,
                reader=reader,
                stops=body.stops,
                keep_tokens=bool(body.logprobs),
                raw=isinstance(reader, TemplateReader),
                one_call=body.parallel_tool_calls is False and not body.must_call,
            )
            constraint = self._constraint(body)
            request = self._request(
                body, prompt, index, limit=limit, top=top, constraint=constraint, param="messages"
            )
            prepared.append(Prepared(request, choice))
        return prepared

    def text(self, body: CompletionBody) -> list[Prepared]:
        """Return the requests of texts to continue, one for each choice; raises RequestError."""
        limit = _LEGACY_TOKENS if body.max_tokens is None else body.max_tokens
        number = self._num_choices(body, len(body.prompts))
        prepared: list[Prepared] = []
        for prompt_number, given in enumerate(body.prompts):
            prompt = self._prompts.text(given)
            for _ in range(number // len(body.prompts)):
                index = len(prepared)
                choice = Choice(
                    index,
                    self._tokenizer,
                    prompt=prompt,
                    prompt_number=prompt_number,
                    reader=PlainReader(),
                    stops=body.stops,
                    keep_tokens=body.logprobs is not None,
                )
                request = self._request(
                    body, prompt, index, limit=limit, top=body.logprobs or 0, param="prompt"
                )
                prepared.append(Prepared(request, choice))
        return prepared

    def _num_choices(self, body: GenerationBody, num_prompts: int) -> int:
        number = num_prompts * (body.n or 1)
        if number > self._settings.max_choices:
            raise RequestError(
                f"n asks for {number} answers: this server gives at most "
                f"{self._settings.max_choices} to a request",
                param="n",
            )
        return number

    def _template(self, body: ChatBody) -> Any:
        """Return the form in which calls are read; None: there are none."""
        own = self._settings.model.response_template
        return own if own is not None else HERMES if body.active_tools else None

    def _constraint(self, body: ChatBody) -> Constraint | None:
        """Return a constraint of one answer's own, since it follows the answer's tokens."""
        if body.must_call:
            functions = {tool.function.name: tool.function.parameters for tool in body.must_call}
            return self._grammars.call(functions)
        form = body.response_format
        if form is None or form.type == "text":
            return None
        schema = ANY_OBJECT if form.type == "json_object" else form.json_schema.schema_
        return self._grammars.json(schema, param="response_format")

    def _request(
        self,
        body: GenerationBody,
        prompt: Sequence[int],
        index: int,
        *,
        limit: int | None,
        top: int,
        param: str,
        constraint: Constraint | None = None,
    ) -> GenerationRequest:
        model, most = self._settings.model, self._settings.max_new_tokens
        room = self._engine.context - len(prompt)
        if room < (limit or 1):
            raise RequestError(
                f"{param} has {len(prompt)} tokens, {limit or 1} are to follow, and the model's "
                f"context is {self._engine.context}: shorten it, or ask for fewer",
                param=param,
                code="context_length_exceeded",
            )
        if limit is not None and limit > most:
            raise RequestError(
                f"max_tokens {limit} is more than this server writes: give at most {most}",
                param="max_tokens",
            )
        seed = secrets.randbits(31) if body.seed is None else body.seed
        request = GenerationRequest(
            prompt=prompt,
            max_new_tokens=min(room, most) if limit is None else limit,
            stop_ids=model.stop_ids,
            sampling=Sampling(
                temperature=model.temperature if body.temperature is None else body.temperature,
                top_p=model.top_p if body.top_p is None else body.top_p,
                seed=(seed + index) % 2**63,
                constraint=constraint,
            ),
            bound=body.bound(self._settings.default_bound),
            top_logprobs=top,
            deadline=time.monotonic() + self._settings.max_seconds,
        )
        self._engine.check(request)
        return request


class Answering:
    """The requests of one body in the engine. Whoever starts it closes it."""

    def __init__(self, engine: TextEngine, prepared: Sequence[Prepared]) -> None:
        self._engine = engine
        self._prepared = prepared
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._running: dict[int, int] = {}
        """Place in ``prepared`` -> number of the request."""

    @property
    def choices(self) -> list[Choice]:
        """The answers, each as far as it has come."""
        return [each.choice for each in self._prepared]

    def start(self) -> None:
        """Hand them to the engine; raises RequestError, and then none runs."""
        loop = asyncio.get_running_loop()

        def deliver(place: int, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._events.put_nowait, (place, event))

        try:
            for place, (request, _) in enumerate(self._prepared):
                self._running[place] = self._engine.submit(request, partial(deliver, place))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End those that still run."""
        for number in self._running.values():
            self._engine.cancel(number)
        self._running = {}

    async def pieces(self) -> AsyncIterator[tuple[Choice, Piece]]:
        """Give what is added to each answer, in the order in which it comes; after its last piece
        a choice has its ``finish_reason``. Raises what went wrong with any.
        """
        while self._running:
            place, event = await self._events.get()
            choice = self._prepared[place].choice
            if isinstance(event, Exception):
                del self._running[place]
                raise event
            if isinstance(event, Outcome):
                del self._running[place]
                yield choice, choice.end(event)
                continue
            if choice.has_enough:
                continue
            piece = choice.take(event)
            if choice.has_enough:
                self._engine.stop(self._running[place])
            yield choice, piece
