"""One request on its way: what it has computed next, and what becomes of the logits.

A text is computed as a *pass* over its prompt, in pieces, and then token by token. Under a verified
bound tokens are drafted from compact pages, and a pass over the full state checks a window of them:
with the exact KL of each drafted distribution it accepts tokens as long as the mean over the answer
stays within epsilon, then takes the full model's own token, whose error is none (of ``exact``, as
long as they are the full model's). A window that is rejected early is the sign to climb a tier.
"""

import math
from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from ..errors import PlacementError
from .batch import Rows
from .bounds import Kind, Metric, kind_of, quality_of
from .generation import Event, Finish, GenerationRequest, Outcome, Token
from .kept_logits import KeptLogits
from .kv.originals import Originals
from .kv.pages import RequestStates
from .verify import Scored, divergences_of, make_chooser

LONGEST_WINDOW = 16
"""Drafted tokens that a pass checks at most."""
_FIRST_WINDOW = 8
_FEW = 0.5
"""Of the latest drafted tokens, accepted: below it the next tier pays."""
_SEEN = 24
"""Drafted tokens that are looked at before a tier is given up."""


class Phase(Enum):
    """What comes next."""

    PROMPT = auto()
    DECODE = auto()
    DRAFT = auto()
    CHECK = auto()
    JUDGE = auto()
    """Nothing, until it is said whether a calibrated bound holds at this tier."""
    CLIMB = auto()
    """Nothing, until there is room for the next tier; what drafts goes on if there is none."""


class Active:
    """The progress of one request. ``tier`` is an index into the ladder, ``top`` the full one."""

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        on_event: Callable[[Event], None],
        *,
        states: RequestStates,
        originals: Originals | None,
        tier: int,
        top: int,
        given: bool = False,
    ) -> None:
        self.number, self.request, self.on_event = number, request, on_event
        self.states, self.originals = states, originals
        self.tier, self.top = tier, top
        self.phase = Phase.PROMPT
        self.tokens: list[int] = list(request.prompt)
        """The prompt, and the tokens that are released or decided."""
        self.passed = len(self.tokens)
        """Of them, the first ones, that a pass computes."""
        self.drafted: list[int] = []
        self._drafts: list[Tensor] = []
        """The logits (V,) that each drafted token was chosen from."""
        self.kept_logits: KeptLogits | None = None
        """Those of all tokens, and of the end, where the answer is to be measured."""
        self.prompt_errors: list[tuple[float, float]] = []
        """Of each layer the sums of squared errors of the prompt's pages, at this tier."""
        self.kind = Kind.NONE if given and tier < top else kind_of(request.bound)
        """Of the bound that is asked for; none where the tier is ``given``."""
        self.is_decided = self.kind is not Kind.CALIBRATED
        """Whether the tier is the one that a calibrated bound allows."""
        self.finish: Finish | None = None
        self.adopted_tokens = 0
        """Of the prompt, that an earlier request had computed."""
        self.asked = False
        """For the next tier, of the scheduler."""
        self.escalations = self.rejected = self.accepted = 0
        self.kl_total = 0.0
        """Nats, over the distributions that were chosen from: the new tokens', and the end's."""
        self.bound_value = 0.0
        """What a calibrated bound says."""
        self.most_bytes = self.most_total_bytes = 0
        self._window = _FIRST_WINDOW
        self._recent: list[int] = []
        """Accepted (1) or not (0), of the latest drafted tokens."""
        self._chooser = make_chooser(request)

    @property
    def num_new(self) -> int:
        """New tokens so far."""
        return len(self.tokens) - len(self.request.prompt)

    def next_rows(self, room: int) -> Rows | None:
        """Return what to compute next, at most ``room`` tokens of a prompt; None: nothing."""
        start = self.states.length
        if self.phase is Phase.PROMPT:
            end = min(self.passed, start + room)
            if end == start:
                return None
            return self._rows(
                self.tokens[start:end], start, True, settles=True, kept=int(end == self.passed)
            )
        if self.phase is Phase.CHECK:
            self.states.crop(len(self.tokens) - 1)
            ids = [self.tokens[-1], *self.drafted]
            return self._rows(ids, len(self.tokens) - 1, True, kept=len(ids))
        if self.phase in (Phase.JUDGE, Phase.CLIMB):
            return None
        return self._rows([self.drafted[-1] if self.drafted else self.tokens[start]], start, False)

    def take(self, scored: Scored) -> None:
        """Go on with the logits of the rows that were asked for. Raises PlacementError for logits
        that no token can be chosen from.
        """
        if not scored.are_finite:
            raise PlacementError("the model's logits aren't finite")
        if self.phase is Phase.PROMPT:
            if self.states.length < self.passed:
                return
            self._release_next(scored)
            self._go_on()
        elif self.phase is Phase.DRAFT:
            self.drafted.append(self._choose(scored, 0))
            self._drafts.append(scored.logits_TV[0].clone())
            if len(self.drafted) >= self._longest or self.drafted[-1] in self.request.stop_ids:
                self.phase = Phase.CHECK
        elif self.phase is Phase.CHECK:
            self._check(scored)
        else:
            self._release_next(scored)
        if self.phase is not Phase.PROMPT:
            self._settle()

    def has_climbed(self, tier: int) -> None:
        """Hear that the pages are now held at a tier."""
        self.tier = tier
        self.asked = False
        self.escalations += 1
        self._recent.clear()
        if self.phase in (Phase.CLIMB, Phase.DRAFT):
            self._go_on()

    def has_asked(self) -> None:
        """Hear that the next tier has been asked for. What drafts goes on if that isn't given at
        once, and after some more tokens may ask again; others wait for it.
        """
        self.asked = self.kind is not Kind.VERIFIED
        if self.kind is Kind.VERIFIED:
            self._recent.clear()
            self.phase = Phase.DRAFT

    def has_stepped_down(self, tier: int) -> None:
        """Hear that the pages are now held at a lower tier, for the sake of others: what comes is
        drafted again, and checked.
        """
        assert self.kind is Kind.VERIFIED, "nothing else is right at any tier"
        self.tier = tier
        self._recent.clear()
        if self.phase is Phase.DECODE:
            self.phase = Phase.DRAFT

    def judge(self, value: float) -> None:
        """Hear the bound of this tier: go on with it, or ask for the next."""
        assert self.request.bound is not None
        self.bound_value = value
        self.is_decided = self.tier == self.top or value <= self.request.bound.epsilon
        self.phase = Phase.DECODE if self.is_decided else Phase.CLIMB

    def begin_again(self, states: RequestStates, originals: Originals | None, tier: int) -> None:
        """Compute the text so far anew, after all that was held of it was given away: by a pass
        what full states made, else each token as it was, so that what follows is the same.
        """
        if self.kind in (Kind.FULL, Kind.VERIFIED):
            self.passed = len(self.tokens)
        self.states, self.originals, self.tier = states, originals, tier
        self.rejected += len(self.drafted)
        self.drafted.clear()
        self._drafts.clear()
        self.asked = False
        self.phase = Phase.PROMPT

    def give_up_states(self) -> None:
        """Hold no keys and values any more, and no originals."""
        if self.originals is not None:
            self.originals.close()
            self.originals = None
        self.states = RequestStates(self.states.shape, self.states.tier, dtype=self.states.dtype)

    def count_bytes(self) -> int:
        """Return the bytes that are held now in fast memory, and remember the most."""
        held = self.states.num_bytes
        below = self.originals.num_bytes if self.originals else 0
        self.most_bytes = max(self.most_bytes, held)
        self.most_total_bytes = max(self.most_total_bytes, held + below)
        return held

    def outcome(self, tier: str) -> Outcome:
        """Return the last event; ``tier``: the name of the one it has."""
        chosen = self.num_new + (self.finish is Finish.STOP)
        value = self.kl_total / max(1, chosen)
        if self.kind is Kind.NONE:
            value = math.inf
        return Outcome(
            finish=self.finish or Finish.CANCELLED,
            prompt_tokens=len(self.request.prompt),
            new_tokens=self.num_new,
            rejected_tokens=self.rejected,
            accepted_tokens=self.accepted,
            cached_tokens=self.adopted_tokens,
            quality=quality_of(
                self.request.bound,
                tier,
                value=self.bound_value if self.kind is Kind.CALIBRATED else value,
                kind=self.kind,
                escalations=self.escalations,
                kv_bytes=self.most_bytes,
                total_bytes=self.most_total_bytes,
            ),
        )

    def _go_on(self) -> None:
        """Leave the prompt, or the tier below, behind."""
        self.prompt_errors = self.states.errors
        if not self.is_decided:
            self.phase = Phase.JUDGE
        elif self.kind is Kind.VERIFIED and self.tier < self.top:
            self.phase = Phase.DRAFT
        else:
            self.phase = Phase.DECODE

    @property
    def _longest(self) -> int:
        return min(self._window, self.request.max_new_tokens - self.num_new)

    def _rows(self, ids: Sequence[int], start: int, is_pass: bool, **more: Any) -> Rows:
        return Rows(
            ids=ids,
            start=start,
            states=self.states,
            originals=self.originals,
            is_pass=is_pass,
            **{"kept": 1, **more},
        )

    def _settle(self) -> None:
        length = self.states.length - len(self.drafted)  # what isn't checked is none of the text
        if self.originals is not None:
            self.states.settle(length=length, on_page=self.originals.write)
        else:
            self.states.settle(length=length)

    def _choose(self, scored: Scored, row: int) -> int:
        if self._chooser is None:
            return scored.largest[row]
        ids = torch.tensor([*self.tokens, *self.drafted])
        number = len(self.tokens) + len(self.drafted) - len(self.request.prompt)
        return self._chooser.choose(ids, scored.logits_TV[row], sequence=0, number=number)[0]

    def _release_next(self, scored: Scored) -> None:
        """Choose the next token, unless that has been done before all was computed anew."""
        if self.states.length == len(self.tokens):
            self._release(scored, [self._choose(scored, 0)])

    def _check(self, scored: Scored) -> None:
        """Accept drafted tokens by the full state's logits, of them and of what comes next."""
        bound = self.request.bound
        assert bound is not None
        drafted, self.drafted = self.drafted, []
        drafts, self._drafts = self._drafts, []
        accepted: list[int] = []
        divergences = divergences_of(scored.logits_TV[:-1], torch.stack(drafts))
        for token, divergence in zip(drafted, divergences, strict=True):
            if bound.metric is Metric.EXACT:
                # What is chosen goes by the tokens before, which are accepted.
                if self._choose(scored, len(accepted)) != token:
                    break
            elif (self.kl_total + divergence) > bound.epsilon * (self.num_new + len(accepted) + 1):
                break
            else:
                self.kl_total += divergence
            accepted.append(token)
            self.drafted.append(token)  # so that the next choice sees it
        self.drafted = []
        count = len(accepted)
        self.rejected += len(drafted) - count
        self.accepted += count
        self.states.crop(len(self.tokens) + count)
        self._recent = [*self._recent, *[1] * count, *[0] * (count < len(drafted))][-_SEEN:]
        self._window = min(2 * self._window, LONGEST_WINDOW) if count == len(drafted) else count + 1
        self._release(scored, accepted, drafts, then_own=True)
        self.phase = Phase.DRAFT
        if len(self._recent) >= _SEEN and sum(self._recent) < _FEW * len(self._recent):
            self.phase = Phase.CLIMB

    def _release(
        self,
        scored: Scored,
        ids: Sequence[int],
        drafts: Sequence[Tensor] = (),
        then_own: bool = False,
    ) -> None:
        """Take tokens into the text, each with its row of logits, then perhaps what the next row
        itself chooses, if the text hasn't ended. ``drafts``: the logits that ``ids`` were chosen
        from, where those are others.
        """
        told: list[Token] = []
        for place in range(len(ids) + then_own):
            if self.finish is not None:
                break
            token = ids[place] if place < len(ids) else self._choose(scored, place)
            if self.kept_logits is not None:
                is_draft = place < min(len(ids), len(drafts))
                logits_TV = drafts if is_draft else scored.logits_TV
                self.kept_logits.append(logits_TV[place])
            if token in self.request.stop_ids:
                self.finish = Finish.STOP
                break
            self.tokens.append(token)
            told.append(scored.describe(place, token, self.request.top_logprobs))
            if self.num_new >= self.request.max_new_tokens:
                self.finish = Finish.LENGTH
        if told:
            self.on_event(tuple(told))
