"""An engine for tests of the endpoint: plain forward passes, one request's token after another's,
in a thread. It takes what the endpoint needs of an engine, and no more.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lib.progressive.bounds import Kind, Metric, Quality, RequestError
from lib.progressive.generation import Event, Finish, GenerationRequest, Outcome, Token

TOKEN_BYTES = 100


@dataclass
class Running:
    request: GenerationRequest
    on_event: Callable[[Event], None]
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None
    cache: Any = None


@dataclass(frozen=True)
class PlainStats:
    running: int
    kv_bytes: int
    escalations: int = 0
    tiers: dict[str, int] = field(default_factory=dict)


class PlainEngine:
    def __init__(self, model: Any, *, max_queue: int = 8, calibrated: bool = False) -> None:
        self.context = model.config.max_position_embeddings
        self.broken: Exception | None = None
        self.steps = 0
        self.paused = threading.Event()
        self.paused.set()
        self._model = model
        self._max_queue = max_queue
        self._calibrated = calibrated
        self._number = 0
        self._running: dict[int, Running] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self, request: GenerationRequest) -> None:
        if request.bound is not None and request.bound.delta and not self._calibrated:
            raise RequestError(
                "quality_bound.delta needs a calibration, and this server has none: give 0",
                param="quality_bound",
                code="no_calibration",
            )

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> int:
        self.check(request)
        with self._changed:
            if len(self._running) >= self._max_queue:
                raise RequestError("many requests wait: ask again later", code="queue_full")
            self._number += 1
            self._running[self._number] = Running(request, on_event)
            self._changed.notify_all()
            return self._number

    def cancel(self, request_id: int) -> None:
        with self._changed:
            if running := self._running.get(request_id):
                running.finish = Finish.CANCELLED

    def stop(self, request_id: int) -> None:
        with self._changed:
            if running := self._running.get(request_id):
                running.finish = Finish.STOP

    @property
    def is_alive(self) -> bool:
        return True

    def stats(self) -> PlainStats:
        with self._changed:
            own = list(self._running.values())
        tokens = sum(len(each.request.prompt) + len(each.tokens) for each in own)
        return PlainStats(len(own), tokens * TOKEN_BYTES, tiers={"full": self._number - len(own)})

    def wait_until_idle(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, seconds)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.paused.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._closed)
                if self._closed:
                    return
                turn = list(self._running.items())
            self.paused.wait()
            for number, running in turn:
                try:
                    if self.broken is not None:
                        raise self.broken
                    event: Event = self._step(running)
                except Exception as error:
                    event = error
                if isinstance(event, tuple):
                    running.on_event(event)
                    continue
                with self._changed:
                    del self._running[number]
                    self._changed.notify_all()
                running.on_event(event)

    def _step(self, running: Running) -> Event:
        request, tokens = running.request, running.tokens
        if request.deadline is not None and time.monotonic() > request.deadline:
            running.finish = Finish.DEADLINE
        if running.finish is None and len(tokens) == request.max_new_tokens:
            running.finish = Finish.LENGTH
        if running.finish is None:
            token = self._next(running)
            if token.id not in request.stop_ids:
                tokens.append(token.id)
                return (token,)
            running.finish = Finish.STOP
        return self._outcome(running)

    @torch.no_grad()
    def _next(self, running: Running) -> Token:
        self.steps += 1
        request, tokens, sampling = running.request, running.tokens, running.request.sampling
        ids = torch.tensor([tokens[-1:] or list(request.prompt)])
        output = self._model(ids, use_cache=True, past_key_values=running.cache)
        running.cache = output.past_key_values
        logprobs = output.logits[0, -1].float().log_softmax(-1)
        scores = logprobs.clone()
        if sampling.constraint is not None:
            scores[~sampling.constraint(tokens)] = -torch.inf
        if sampling.temperature:
            generator = torch.Generator().manual_seed(sampling.seed * 1000 + len(tokens))
            noise = torch.rand(len(scores), generator=generator).log().neg().log().neg()
            scores = scores / sampling.temperature + noise
        chosen = int(scores.argmax())
        values, places = logprobs.topk(request.top_logprobs)
        top = tuple(zip(places.tolist(), values.tolist(), strict=True))
        return Token(id=chosen, logprob=float(logprobs[chosen]), top=top)

    def _outcome(self, running: Running) -> Outcome:
        assert running.finish is not None
        bound = running.request.bound
        num_bytes = (len(running.request.prompt) + len(running.tokens)) * TOKEN_BYTES
        quality = Quality(
            tier="full",
            bound=0.0,
            metric=Metric.KL if bound is None else bound.metric,
            kind=Kind.FULL,
            delta=0.0,
            escalations=0,
            kv_bytes=num_bytes,
            total_bytes=num_bytes,
        )
        return Outcome(
            finish=running.finish,
            prompt_tokens=len(running.request.prompt),
            new_tokens=len(running.tokens),
            rejected_tokens=0,
            quality=quality,
        )
