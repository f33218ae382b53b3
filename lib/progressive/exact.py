"""The full model's own text at about the speed of its compressed copy.

The copy drafts a window of tokens; one pass over the full weights, which stream, checks them all.
What comes out is the full model's: each token is chosen from its logits. The ordinary forward of
one token computes in another order than a pass: where its two largest scores are closer than
``tolerance`` it may choose another token. ``strict`` computes such tokens as it does.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..tiering import Runtime, Stats
from ..units import parse_bytes
from ..vocabulary import Tier
from .decoding import Decoding, Drafting, Pair
from .division import LONGEST
from .draft import Draft
from .passes import ROWS, Passes, Replay
from .requests import (
    arguments_to_pass,
    check_arguments,
    check_length,
    check_settings,
    for_drafts,
)
from .verify import Chooser
from .windows import Windows

_SAFETY = 4.0
"""The tolerance over the largest difference that was measured."""
_TRIED_TOKENS, _TRIED_STEPS = 16, 4


@dataclass(slots=True, kw_only=True)
class ExactStats(Stats):
    """A snapshot with what drafting came to. Resident bytes are of draft and full weights; all else
    is of the passes over the full weights.
    """

    drafting: Drafting


class ExactRuntime(Runtime):
    """A model whose ``generate`` drafts with its compressed copy and checks with its full weights.

    What ``Runtime`` says is of the full weights. Forwards of the model itself are theirs, too.
    """

    def __init__(self, full: Runtime, model: Any, draft: Draft, *, strict: bool) -> None:
        super().__init__(full._keeper)
        self.draft = draft
        self._model = model
        self._pair = Pair(
            model=model,
            draft=draft.model,
            windows=Windows(longest=LONGEST),
            device=full._keeper.memory.device,
            tolerance=(lambda: self.tolerance) if strict else None,
        )
        self._tolerance: float | None = None
        self._generate: Callable[..., Any] | None = model.generate
        vars(model)["generate"] = self._make_generate(model.generate)

    @property
    def tolerance(self) -> float:
        """The largest difference of logits between a pass and the ordinary forward of one token, as
        measured on random tokens, or what the model's dtype rounds the largest logit by, where that
        is more; times four. Measured when it is first asked for.
        """
        if self._tolerance is None:
            self._tolerance = self._measure_tolerance()
        return self._tolerance

    @property
    def budget(self) -> dict[str, int | None]:
        """The bytes that each tier may hold, draft and full weights together.

        Setting it leaves the draft as it is, and plans the full weights anew: see
        ``Runtime.budget``.
        """
        return self._with_draft(super().budget, 1)

    @budget.setter
    def budget(self, budget: Mapping[str, str | int | None]) -> None:
        limit, own = budget.get("HBM"), self.draft.fast_bytes
        if limit is not None and parse_bytes(limit) <= own:
            raise InputError(
                f"budget HBM={limit} is too small for the draft alone, which takes {own} bytes: "
                "give more, or attach again with a lower precision"
            )
        Runtime.budget.fset(self, self._with_draft(budget, -1))  # type: ignore[attr-defined]

    def stats(self) -> "ExactStats":
        """Return what happened since attach or the last reset, draft and full weights together."""
        stats, draft = super().stats(), self.draft.runtime.stats()
        figures = {each.name: getattr(stats, each.name) for each in fields(Stats)}
        for name in ("resident_bytes", "peak_resident_bytes"):
            figures[name] += getattr(draft, name) + self.draft.staging_bytes
        return ExactStats(**figures, drafting=replace(self._pair.drafting))

    def reset_stats(self) -> None:
        """Start all statistics anew; what is known of windows stays."""
        super().reset_stats()
        self.draft.runtime.reset_stats()
        self._pair.drafting = Drafting()

    def compile(self) -> None:
        """Compile the draft's steps: see ``Runtime.compile``."""
        self.draft.runtime.compile()

    def detach(self) -> None:
        """Bring every weight back as ``Runtime.detach`` does, and free the draft's."""
        if self._generate is not None:
            vars(self._model)["generate"] = self._generate
            self._generate = None
        self._pair.beside.end()
        self.draft.close()  # first: what it held may be what the weights lack
        super().detach()

    def _with_draft(
        self, budget: Mapping[str, str | int | None], sign: int
    ) -> dict[str, int | None]:
        """Return a budget with the draft's bytes (1), or without them (-1)."""
        sizes = {name: None if size is None else parse_bytes(size) for name, size in budget.items()}
        limit, own = sizes.get(Tier.HBM), self.draft.fast_bytes
        if limit is not None:
            sizes[str(Tier.HBM)] = max(limit + sign * own, 0)
        return sizes

    def _make_generate(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(type(self._model).generate)

        def generate(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(self._model, *args, **kwargs).arguments
            check_arguments(given)

            def decode(
                model: Any,
                input_ids: Tensor,
                logits_processor: Any,
                stopping_criteria: Any,
                generation_config: Any,
                **model_kwargs: Any,
            ) -> Any:
                check_settings(generation_config, given, batch=len(input_ids))
                check_length(model.config, generation_config.max_length)
                seed = int(torch.randint(2**31 - 1, (1,))) if generation_config.do_sample else None
                drafts = for_drafts(logits_processor, given.get("logits_processor"))
                return Decoding(
                    self._pair,
                    input_ids,
                    chooser=Chooser(logits_processor, seed),
                    guesser=Chooser(drafts, seed),
                    stopping=stopping_criteria,
                    settings=generation_config,
                    mask_BT=model_kwargs.get("attention_mask"),
                    streamer=given.get("streamer"),
                ).run()

            return plain(custom_generate=decode, **arguments_to_pass(self._model, given))

        return generate

    @torch.no_grad()
    def _measure_tolerance(self) -> float:
        config = self._model.config.get_text_config(decoder=True)
        generator = torch.Generator().manual_seed(0)
        tokens = _TRIED_TOKENS + _TRIED_STEPS
        ids_1T = torch.randint(config.vocab_size, (1, tokens), generator=generator)
        ids_1T = ids_1T.to(self._pair.device)
        longest = min(_TRIED_TOKENS + ROWS, _context(config))
        passes = Passes(self._model, None, [0], longest, self._pair.device)
        passes.prompt(ids_1T[:, :_TRIED_TOKENS])
        checked_TV = passes.check(ids_1T[:, _TRIED_TOKENS:])[0]
        rounding = torch.finfo(checked_TV.dtype).eps
        replay, largest = Replay(self._model), rounding * float(checked_TV.abs().max())
        for step in range(_TRIED_STEPS):
            logits_V = replay.logits(ids_1T[0, : _TRIED_TOKENS + step + 1], _TRIED_TOKENS)
            largest = max(largest, float((logits_V - checked_TV[step]).abs().max()))
        return _SAFETY * largest


def _context(config: Any) -> int:
    """Return the most positions that a model has; no limit is a large number."""
    return int(getattr(config, "max_position_embeddings", None) or 2**31)
