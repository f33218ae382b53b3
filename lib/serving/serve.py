"""The endpoint as a process: what it serves, where it listens, and how it ends.

SIGTERM and Ctrl-C drain it: new requests get 503, those on their way are finished, for a while. A
second signal ends it at once.
"""

import contextlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from ..errors import InputError
from .gate import Gate
from .settings import ModelCard

_BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""Longer than clients and proxies keep idle connections: one that the server closes while a request
is on its way is an error there.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A socket that is bound, to which clients may connect from now on."""

    socket: socket.socket
    port: int
    url: str
    """Of the API."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """What answers requests, wherever they come from."""

    gate: Gate
    document: Mapping[str, Any]
    """What it says of itself."""


def listen(host: str, port: int) -> Listener:
    """Open the port (0: a free one); raises InputError where that can't be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        raise InputError(
            f"--host {host} --port {port} can't be listened to ({error.strerror or error}): give "
            "another port, or 0 for a free one"
        ) from error
    opened.set_inheritable(True)
    shown, taken = f"[{host}]" if ":" in host else host, opened.getsockname()[1]
    return Listener(socket=opened, port=taken, url=f"http://{shown}:{taken}/v1")


def run_until_stopped(gate: Gate, listener: Listener, *, drain_seconds: float) -> None:
    """Answer requests until a signal comes, and for so long those that are on their way. Raises
    KeyboardInterrupt where it was Ctrl-C.
    """
    config = uvicorn.Config(
        gate,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
        lifespan="off",
    )
    server = _Server(config, gate, drain_seconds)
    with contextlib.closing(listener.socket):
        server.run(sockets=[listener.socket])
    if server.interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    """A server that still answers while it drains: new requests are told why they are refused."""

    def __init__(self, config: uvicorn.Config, gate: Gate, drain_seconds: float) -> None:
        super().__init__(config)
        self.interrupted = False
        self._gate = gate
        self._drain_seconds = drain_seconds
        self._stop_by = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second; called by uvicorn."""
        self.interrupted = sig == 2
        if self._gate.draining:
            self.should_exit = self.force_exit = True
            return
        self._gate.draining = True
        self._stop_by = time.monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Stop once nothing is on its way, or the time is over; called by uvicorn ten times a
        second.
        """
        if self._gate.draining and (not self._gate.active or time.monotonic() > self._stop_by):
            self.should_exit = True
        return await super().on_tick(counter)


def describe_model(model: Any, tokenizer: Any, *, name: str) -> ModelCard:
    """Return what replies need of a model of transformers: what ends its texts, and its
    generation_config's temperature and top_p where that says to sample; it is greedy otherwise.
    """
    from transformers.cli.serving.utils import get_response_template

    settings = model.generation_config
    ends = settings.eos_token_id
    stop_ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    samples = bool(settings.do_sample)
    return ModelCard(
        name=name,
        vocab_size=model.config.get_text_config(decoder=True).vocab_size,
        stop_ids=frozenset(int(token) for token in stop_ids),
        chat=getattr(tokenizer, "chat_template", None) is not None,
        temperature=float(settings.temperature or 1.0) if samples else 0.0,
        top_p=float(settings.top_p or 1.0) if samples else 1.0,
        response_template=get_response_template(tokenizer, model),
    )


def ignored_settings(model: Any) -> list[str]:
    """Name what a model's generation_config sets, and the endpoint doesn't do."""
    settings = model.generation_config
    names = ("repetition_penalty", "no_repeat_ngram_size", "min_p", "typical_p", "suppress_tokens")
    found = [name for name in names if getattr(settings, name, None) not in (None, 0, 1.0, [])]
    if settings.do_sample and settings.top_k:
        found.append("top_k")
    return found


def served_name(model: str, given: str | None) -> str:
    """Return what requests call a model: what is given, else its id or its folder's name."""
    return given or (Path(model).resolve().name if Path(model).is_dir() else model)
