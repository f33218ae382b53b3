"""Drafting behind texts: a window before each pass, and more while the pass checks it.

What is drafted during a pass begins the next window where all sequences have the window's tokens,
and then the first that was drafted behind it. A pass overwrites the window's keys and values, which
the draft still looks at: to go on it gets a copy of the cache, into which what was kept of each
pass is copied.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .beside import Beside
from .cache import CroppableCache
from .passes import Passes
from .verify import Chooser


@dataclass(slots=True)
class Text:
    """One sequence of a batch: its tokens so far, padding and prompt included."""

    ids_T: Tensor
    length: int
    start: int
    """Where it begins, after padding."""
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def so_far(self) -> Tensor:
        """Its tokens (T,)."""
        return self.ids_T[: self.length]

    @property
    def last(self) -> int:
        """Its last token."""
        return int(self.ids_T[self.length - 1])

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another token."""
        return self.length == len(self.ids_T)

    def add(self, token: int) -> None:
        """Append a token."""
        self.ids_T[self.length] = token
        self.length += 1


class Drafter:
    """Drafts the next tokens of texts with a model's draft."""

    def __init__(
        self,
        passes: Passes,
        guessers: Sequence[Chooser],
        texts: Sequence[Text],
        prompt_tokens: int,
        beside: Beside,
    ) -> None:
        self.beside_seconds = 0.0
        """What the tokens have taken that were drafted during the latest pass."""
        self._passes, self._guessers, self._texts = passes, guessers, texts
        self._prompt_tokens = prompt_tokens
        self._beside = beside
        self._tries: list[Text] = []
        """The texts, and what was drafted behind them."""
        self._drafted: list[list[int]] = [[] for _ in texts]
        self._own: CroppableCache | None = None
        """A copy of the cache, from where the draft has gone on."""

    @property
    def held(self) -> int:
        """Tokens of each sequence that are drafted already."""
        return len(self._drafted[0])

    def draft(self, length: int) -> None:
        """Have at least so many tokens behind each text."""
        if not self.held:
            self._tries = [
                Text(text.ids_T.clone(), text.length, text.start, text.done) for text in self._texts
            ]
        while self.held < length:
            self._step()

    def window(self, length: int) -> Tensor:
        """Return the first tokens (B, T) behind the texts."""
        device = self._texts[0].ids_T.device
        drafted = [tokens[:length] for tokens in self._drafted]
        return torch.tensor(drafted, device=device, dtype=torch.long).view(len(drafted), length)

    @contextlib.contextmanager
    def going_on(self, most: int) -> Iterator[None]:
        """Leave the cache to a pass for the length of a block, and draft so many tokens more at
        most meanwhile.
        """
        self.beside_seconds = 0.0
        shared = self._passes.cache
        if self._own is None:
            self._own = shared.copy() if most else None
            shared.take_back(self.held)
        if self._own is None or most == 0:
            yield
            return
        room = self._own.room - int(self._own.lengths.max())
        with self._beside.repeat(self._timed_step, min(most, room)):
            yield

    def follow(self, window: int, kept_B: Tensor) -> None:
        """Go on from where the texts are after a pass: of a window of so many tokens, and the one
        before it, so many of each sequence were kept.
        """
        texts, shared, own = self._texts, self._passes.cache, self._own
        goes_on = own is not None and all(
            text.done or (kept == window + 1 and tokens[window : window + 1] == [text.last])
            for text, kept, tokens in zip(texts, kept_B.tolist(), self._drafted, strict=True)
        )
        for tokens, text, each in zip(self._drafted, texts, self._tries, strict=True):
            del tokens[: window + 1 if goes_on else None]
            each.done = text.done
        if own is None:
            return
        if self.beside_seconds == 0.0 and not self.held:
            self._own = None
            return
        own.copy_tokens(shared, shared.lengths - kept_B, window + 1)
        # What has ended would grow on with the others, beyond the room that there is.
        behind = [text.done or not goes_on for text in texts]
        own.end_with(shared, torch.tensor(behind, device=kept_B.device))

    def _timed_step(self) -> None:
        begin = time.perf_counter()
        self._step()
        self.beside_seconds += time.perf_counter() - begin

    def _step(self) -> None:
        """Draft one token more behind each text."""
        tries = self._tries
        last_B1 = torch.tensor([[each.last] for each in tries], device=tries[0].ids_T.device)
        logits_BV = self._passes.guess(last_B1, self._own or self._passes.cache)
        drafted = [0] * len(tries)
        for sequence, each in enumerate(tries):
            if each.done or each.is_full:
                continue
            drafted[sequence], _ = self._guessers[sequence].choose(
                each.so_far,
                logits_BV[sequence],
                sequence=sequence,
                number=each.length - self._prompt_tokens,
            )
            each.add(drafted[sequence])
        for tokens, token in zip(self._drafted, drafted, strict=True):
            tokens.append(token)
