"""Forwards of a full model and of its draft on one cache, and of the model as ``generate`` has it.

What the draft has written to the cache is taken back before a pass writes its own; where it drafts
on meanwhile it has a copy. A pass has the same number of rows whatever it checks, and a token the
same place in the cache: so the text depends neither on the draft nor on the windows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import CroppableCache, Masks
from .division import LONGEST

ROWS = LONGEST + 1
"""Tokens of a pass."""


class Passes:
    """Forwards of the full model and of its draft, on one cache."""

    def __init__(
        self, model: Any, draft: Any, starts: Sequence[int], longest: int, device: torch.device
    ) -> None:
        """Have a cache for sequences of at most ``longest`` tokens, padding included."""
        config = model.config.get_text_config(decoder=True)
        self.model, self.draft = model, draft
        self.cache = CroppableCache(config.num_hidden_layers, longest + ROWS)
        self._longest = longest
        self._masks = Masks(model.config, self.cache.room, starts, device)
        self._starts_B1 = torch.tensor(starts, device=device)[:, None]
        self._dtype = model.dtype

    def prompt(self, ids_BT: Tensor) -> Tensor:
        """Return the full model's logits (B, V) after a prompt."""
        none_B = torch.zeros(len(ids_BT), dtype=torch.long, device=ids_BT.device)
        tokens = ids_BT.shape[1]
        return self._run(self.model, ids_BT, self.cache, none_B, tokens, logits_to_keep=1)[:, -1]

    def guess(self, ids_B1: Tensor, cache: CroppableCache) -> Tensor:
        """Return the draft's logits (B, V) after one more token, of the cache or a copy of it."""
        return self._run(self.draft, ids_B1, cache, cache.lengths, 1)[:, -1]

    def check(self, ids_BT: Tensor) -> Tensor:
        """Return the full model's logits (B, T, V) after each of at most ROWS more tokens. The
        cache then has ROWS more: what is beyond them is none of the text.
        """
        tokens = ids_BT.shape[1]
        padded_BM = torch.nn.functional.pad(ids_BT, (0, ROWS - tokens))
        lengths_B = self.cache.lengths
        return self._run(self.model, padded_BM, self.cache, lengths_B, tokens)[:, :tokens]

    def _run(
        self,
        model: Any,
        ids_BT: Tensor,
        cache: CroppableCache,
        lengths_B: Tensor,
        num_real: int,
        **kwargs: Any,
    ) -> Tensor:
        tokens = ids_BT.shape[1]
        places_T = torch.arange(tokens, device=ids_BT.device).clamp_(max=num_real - 1)
        # Rows beyond a text, also of those that have ended, have a position that there is; a
        # text's last token, which nothing comes after, needs none.
        places_BT = (lengths_B[:, None] + places_T).clamp_(max=max(self._longest - 2, 0))
        positions_BT = (places_BT - self._starts_B1).clamp_(min=0)
        output = model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=self._masks.make(lengths_B, tokens, self._dtype),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **kwargs,
        )
        logits: Tensor = output.logits
        return logits


class Replay:
    """One sequence as plain ``generate`` computes it: a prompt, then token by token."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        self._model = model
        self._cache = DynamicCache(config=model.config)
        self._done = 0

    def logits(self, ids_T: Tensor, prompt_tokens: int) -> Tensor:
        """Return the logits (V,) after a text of which the first tokens are the prompt."""
        while self._done < len(ids_T):
            end = max(prompt_tokens, self._done + 1)
            positions_1T = torch.arange(self._done, end, device=ids_T.device)[None]
            output = self._model(
                input_ids=ids_T[None, self._done : end],
                position_ids=positions_1T,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
                logits_to_keep=1,
            )
            self._done = end
        logits_V: Tensor = output.logits[0, -1]
        return logits_V
