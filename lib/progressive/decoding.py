"""One call of ``generate``: windows are drafted and checked until all sequences have ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .beside import Beside
from .division import LONGEST
from .drafter import Drafter, Text
from .passes import ROWS, Passes, Replay
from .requests import num_positions
from .verify import Chooser, top_gap
from .windows import Windows


@dataclass(slots=True, kw_only=True)
class Drafting:
    """What drafting and checking came to since attach or the last reset."""

    windows: int = 0
    drafted: int = 0
    ahead: int = 0
    """Of the drafted tokens, those that were drafted while the pass before theirs ran."""
    accepted: int = 0
    rejected: int = 0
    """Drafted tokens that the full model would not have chosen; those after one in its window are
    neither accepted nor rejected.
    """
    redone: int = 0
    """Tokens that ``strict`` has computed again."""
    draft_seconds: float = 0.0
    pass_seconds: float = 0.0
    """Of passes over the full weights, prompts included."""

    @property
    def acceptance(self) -> float | None:
        """The share of the judged tokens that were accepted; None where none was judged."""
        judged = self.accepted + self.rejected
        return self.accepted / judged if judged else None


@dataclass(slots=True, kw_only=True)
class Pair:
    """A full model and its draft, and what they have come to so far.

    ``tolerance``: below which gap of the two largest scores a token is computed again as plain
    ``generate`` does; None: none is.
    """

    model: Any
    draft: Any
    windows: Windows
    tolerance: Callable[[], float] | None
    device: torch.device
    drafting: Drafting = field(default_factory=Drafting)
    beside: Beside = field(default_factory=Beside)
    """Drafts while a pass runs."""


class Decoding:
    """One call of ``generate``."""

    def __init__(
        self,
        pair: Pair,
        ids_BT: Tensor,
        *,
        chooser: Chooser,
        guesser: Chooser,
        stopping: Any,
        settings: Any,
        mask_BT: Tensor | None,
        streamer: Any,
    ) -> None:
        self._pair = pair
        self._choosers = chooser.by_sequence(len(ids_BT))
        self._stopping = stopping
        self._streamer = streamer
        self._settings = settings
        self._prompt_tokens = ids_BT.shape[1]
        self._home = ids_BT.device
        self._prompt_BT = ids_BT = ids_BT.to(pair.device)
        starts = [0] * len(ids_BT) if mask_BT is None else _starts(mask_BT)
        longest = settings.max_length
        self._texts = [
            Text(torch.cat([ids_T, ids_T.new_zeros(longest - len(ids_T))]), len(ids_T), start)
            for ids_T, start in zip(ids_BT, starts, strict=True)
        ]
        self._passes = Passes(pair.model, pair.draft, starts, longest, pair.device)
        pair.beside.end()  # of a text that was interrupted
        self._drafter = Drafter(
            self._passes,
            guesser.by_sequence(len(ids_BT)),
            self._texts,
            self._prompt_tokens,
            pair.beside,
        )
        self._replay = Replay(pair.model) if pair.tolerance is not None else None
        if self._replay is not None and (len(ids_BT) > 1 or starts[0]):
            raise InputError(
                "exact='strict' computes one sequence without padding at a time: give one, or "
                "attach with exact=True"
            )

    def run(self) -> Any:
        """Decode all sequences to their ends; returns what ``generate`` does."""
        stats = self._pair.drafting
        self._pair.windows.begin(len(self._texts))
        begin = time.perf_counter()
        logits_BV = self._passes.prompt(self._prompt_BT)
        stats.pass_seconds += time.perf_counter() - begin
        for number, text in enumerate(self._texts):
            self._choose(number, text, logits_BV[number])
        while not all(text.done for text in self._texts):
            self._window()
        if self._streamer is not None:
            self._streamer.end()
        return self._result()

    def _window(self) -> None:
        """Draft, check, and take back what is none of the text."""
        windows, stats, texts = self._pair.windows, self._pair.drafting, self._texts
        drafter = self._drafter
        left = self._left()
        longest = min(LONGEST, left - 1)
        begin = time.perf_counter()
        held = min(drafter.held, longest)
        drafter.draft(min(windows.choose(), longest))
        length = min(drafter.held, longest)
        drafted_BK = drafter.window(length)
        middle, before = time.perf_counter(), drafter.held
        last_B1 = torch.tensor([[text.last] for text in texts], device=drafted_BK.device)
        most = self._most_beside(length, left)
        with drafter.going_on(most):
            logits_BTV = self._passes.check(torch.cat([last_B1, drafted_BK], dim=1))
        end = time.perf_counter()
        beside = (drafter.held - before, drafter.beside_seconds) if most else None
        kept, judged = [], []
        for number, text in enumerate(texts):
            if text.done:
                kept.append(0)
                continue
            accepted = self._accept(number, text, drafted_BK[number], logits_BTV[number])
            kept.append(accepted + 1)  # the token before the window, too
            stats.drafted += length
            stats.ahead += held
            stats.accepted += accepted
            if not text.done:  # what lies behind its end was judged by nobody
                stats.rejected += accepted < length
                judged.append(accepted)
        kept_B = torch.tensor(kept, device=drafted_BK.device)
        self._passes.cache.take_back(ROWS - kept_B)
        drafter.follow(length, kept_B)
        seconds = {"draft_seconds": middle - begin, "pass_seconds": end - middle}
        windows.saw(judged, drafted=length, held=held, beside=beside, **seconds)
        stats.windows += 1
        stats.draft_seconds += middle - begin
        stats.pass_seconds += end - middle

    def _left(self) -> int:
        """Return how many tokens may come at most; a draft sees no position that there isn't, which
        a text may end before.
        """
        lengths = [text.length for text in self._texts if not text.done]
        left: int = self._settings.max_length - min(lengths)
        positions = num_positions(self._pair.model.config)
        if positions is not None:
            left = min(left, max(positions + 1 - max(lengths), 1))
        return left

    def _most_beside(self, window: int, left: int) -> int:
        """Return how many tokens to draft at most while a pass checks a window."""
        if not (self._pair.windows.goes_on() and _may_compute_aside(self._pair.device)):
            return 0
        # Of the text, behind the window; a window more than the pass's own token is of no use.
        most = min(left - 1, window + 1 + LONGEST) - self._drafter.held
        return most if most > 1 else 0

    def _accept(self, number: int, text: Text, drafted_K: Tensor, logits_TV: Tensor) -> int:
        """Add the full model's tokens for as long as it has seen them itself; returns how many of
        the drafted ones were among them.
        """
        guesses = drafted_K.tolist()
        accepted = 0
        for row in range(len(logits_TV)):
            token = self._choose(number, text, logits_TV[row])
            if row < len(guesses) and token == guesses[row]:
                accepted += 1
            else:
                break
            if text.done:
                break
        return accepted

    def _choose(self, number: int, text: Text, logits_V: Tensor) -> int:
        """Add the next token of a sequence, and see whether that ends it."""
        chooser, place = self._choosers[number], text.length - self._prompt_tokens
        token, scores_V = chooser.choose(text.so_far, logits_V, sequence=number, number=place)
        if self._replay is not None and self._pair.tolerance is not None:
            noisy_V = chooser.noisy(scores_V, sequence=number, number=place)
            if top_gap(noisy_V) < self._pair.tolerance() * _stretch(self._settings):
                self._pair.drafting.redone += 1
                logits_V = self._replay.logits(text.so_far, self._prompt_tokens)
                token, scores_V = chooser.choose(
                    text.so_far, logits_V, sequence=number, number=place
                )
        text.add(token)
        if self._settings.return_dict_in_generate:
            if self._settings.output_scores:
                text.scores.append(scores_V)
            if self._settings.output_logits:
                text.logits.append(logits_V.to(torch.float32, copy=True))
        if self._streamer is not None:
            self._streamer.put(text.ids_T[text.length - 1 : text.length].cpu())
        scores = tuple(score_V[None] for score_V in text.scores) or None
        stops = bool(self._stopping(text.so_far[None], scores)[0])
        text.done = stops or text.is_full
        return token

    def _result(self) -> Any:
        from transformers.generation.utils import GenerateDecoderOnlyOutput

        settings, texts = self._settings, self._texts
        longest = max(text.length for text in texts)
        pad = settings._pad_token_tensor
        sequences_BT = torch.stack([text.ids_T[:longest] for text in texts]).to(self._home)
        for ids_T, text in zip(sequences_BT, texts, strict=True):
            ids_T[text.length :] = 0 if pad is None else pad
        if not settings.return_dict_in_generate:
            return sequences_BT
        kept: dict[str, Any] = {}
        if settings.output_scores:
            kept["scores"] = _by_step([text.scores for text in texts])
        if settings.output_logits:
            kept["logits"] = _by_step([text.logits for text in texts])
        kept["past_key_values"] = self._passes.cache
        return GenerateDecoderOnlyOutput(sequences=sequences_BT, **kept)  # type: ignore[arg-type]


def _may_compute_aside(device: torch.device) -> bool:
    """Say whether another thread computes as this one: it has none of the modes that are set here,
    and on an accelerator it would wait for what this one waits for.
    """
    return device.type == "cpu" and not torch._C._len_torch_function_stack()


def _stretch(settings: Any) -> float:
    """Return by how much processors pull logits apart, at most: by temperature, and penalty."""
    temperature = settings.temperature if settings.do_sample else None
    penalty = settings.repetition_penalty or 1.0
    return max(1.0, 1.0 / (temperature or 1.0)) * max(penalty, 1.0 / penalty)


def _by_step(scores: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Return (B, V) for each step; zeros for sequences that have ended."""
    steps = max(map(len, scores))
    empty = torch.zeros_like(next(each for each in scores if each)[0])
    return tuple(
        torch.stack([each[step] if step < len(each) else empty for each in scores])
        for step in range(steps)
    )


def _starts(mask_BT: Tensor) -> list[int]:
    """Return where each sequence begins; raises InputError where padding is not in front."""
    starts: list[int] = (mask_BT == 0).sum(-1).tolist()
    for mask_T, start in zip(mask_BT, starts, strict=True):
        if bool((mask_T[start:] == 0).any()):
            raise InputError(
                "exact output takes prompts that are padded on the left: tokenize with "
                "padding_side='left'"
            )
    return starts
