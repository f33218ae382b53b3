"""By how much an answer differs from the full model's, measured after it was given.

The answer's tokens go through the full model once, as a prompt does, and the distributions that
they were chosen from are compared with its own, one by one. Calibration measures so at every tier,
and an audit now and then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import PlacementError
from .active import Active, Phase
from .batch import Rows
from .bounds import Quality
from .generation import Event, Finish, GenerationRequest, Outcome
from .kv.originals import Originals
from .kv.pages import RequestStates
from .ladder import PAGE_TOKENS
from .verify import Scored, divergences_of

LayerErrors = Sequence[tuple[float, float]]
"""Of each layer the sums of squared errors that its compact keys and values have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one answer at one tier was found to be."""

    tier: int
    tokens: tuple[int, ...]
    """The answer."""
    quality: Quality
    """What it was said to have."""
    errors: LayerErrors
    """Of the prompt's pages."""
    prompt_tokens: int
    divergences: tuple[float, ...]
    """KL(full || answered with) of each token, nats; the end's last, where there was one."""

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.divergences) / max(1, len(self.divergences))


def describe_answer(answer: Active, divergences: Sequence[float], name: str) -> Measurement:
    """Return the measurement of an answer; ``name``: its tier's."""
    start = len(answer.request.prompt)
    return Measurement(
        tier=answer.tier,
        tokens=tuple(answer.tokens[start:]),
        quality=answer.outcome(name).quality,
        errors=answer.prompt_errors,
        prompt_tokens=start,
        divergences=tuple(divergences),
    )


OnMeasured = Callable[[Measurement | Exception], None]


def pass_over(answer: Active, on_measured: OnMeasured) -> dict[str, Any]:
    """Return the request (of ``waiting.Waiting``) for the pass that measures an answer."""
    assert answer.kept_logits is not None
    tokens = answer.tokens[: len(answer.request.prompt) - 1 + len(answer.kept_logits)]
    return {
        "request": GenerationRequest(prompt=tokens, max_new_tokens=1),
        "on_event": partial(tell_unmeasured, on_measured),
        "tier": 0,
        "on_measured": on_measured,
        "answer": answer,
    }


class AuditPass(Active):
    """A pass over an answer that compares it with the full model. Its events go nowhere; its last
    is told with the measurement. ``name``: of the answer's tier.
    """

    def __init__(
        self,
        number: int,
        answer: Active,
        on_measured: OnMeasured,
        name: str,
        *,
        states: RequestStates,
        originals: Originals | None,
    ) -> None:
        assert answer.kept_logits is not None
        start = len(answer.request.prompt) - 1
        tokens = answer.tokens[: start + len(answer.kept_logits)]
        super().__init__(
            number,
            GenerationRequest(prompt=tokens, max_new_tokens=1),
            self._tell,
            states=states,
            originals=originals,
            tier=0,
            top=0,
        )
        self._start, self._kept = start, answer.kept_logits
        self._answer, self._on_measured, self._name = answer, on_measured, name
        self._divergences: list[float] = []

    def begin_again(self, states: RequestStates, originals: Originals | None, tier: int) -> None:
        """Compare from the first token on."""
        self._divergences.clear()
        super().begin_again(states, originals, tier)

    def next_rows(self, room: int) -> Rows | None:
        """Return the next tokens of the text."""
        assert self.phase is Phase.PROMPT
        start = self.states.length
        end = min(len(self.tokens), start + room)
        if end == start:
            return None
        compared = max(0, end - max(start, self._start))
        kept = min(compared, PAGE_TOKENS)  # so few logits are in memory at a time
        end -= compared - kept
        return self._rows(self.tokens[start:end], start, True, settles=True, kept=kept)

    def take(self, scored: Scored) -> None:
        """Compare the full model's logits with those that tokens were chosen from."""
        if len(scored):
            done = len(self._divergences)
            others = self._kept.read(done, len(scored))
            self._divergences += divergences_of(scored.logits_TV, others)
        if self.states.length == len(self.tokens):
            self.finish = Finish.LENGTH

    def _tell(self, event: Event) -> None:
        self._kept.close()
        if self.finish is Finish.LENGTH:
            self._on_measured(describe_answer(self._answer, self._divergences, self._name))
        else:
            tell_unmeasured(self._on_measured, event)


def tell_unmeasured(on_measured: OnMeasured, event: Event) -> None:
    """Say that an answer wasn't measured, and why."""
    if isinstance(event, Exception):
        on_measured(event)
    elif isinstance(event, Outcome):
        on_measured(PlacementError(f"the answer was not measured: it was ended ({event.finish})"))
