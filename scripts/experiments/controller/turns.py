"""Several runtimes that decode the same text in turn, token by token: what the machine does
meanwhile, to its caches or its clock rate, it does to all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lib.tiering import Runtime
from lib.tiering.transfer.emulation import EmulatedTime
from scripts.experiments.controller.decoding import Decoded, Given


class Stopwatch:
    """Seconds of a clock, of the time between ``start`` and ``stop``."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        """Return the seconds so far."""
        if self._since is None:
            return self._seconds
        return self._seconds + self._clock() - self._since

    def start(self) -> None:
        """Go on."""
        self._since = self._clock()

    def stop(self) -> None:
        """Stand still."""
        self._seconds = self()
        self._since = None


@dataclass(slots=True, kw_only=True)
class Player:
    """A model of its own with its runtime, whose clock stands still while others compute."""

    model: Any
    runtime: Runtime
    watch: Stopwatch

    def __post_init__(self) -> None:
        charges = self.runtime._keeper.memory.charges
        assert isinstance(charges, EmulatedTime)
        charges.clock = self.watch

    def feed(self, ids: Any, cache: Any) -> Any:
        """Return the model's output for tokens after those of a cache."""
        self.watch.start()
        try:
            return self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        finally:
            self.watch.stop()


def decode_in_turn(players: Mapping[str, Player], given: Given) -> dict[str, Decoded]:
    """Feed each row's prompt to all, then its tokens one by one, each to all in a turn that begins
    with another one every time; only tokens are timed.
    """
    names = list(players)
    seconds, stalled = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    logits: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    with torch.no_grad():
        for row in given.tokens:
            prompt = row[None, : given.prompt_tokens]
            caches = {
                name: player.feed(prompt, None).past_key_values for name, player in players.items()
            }
            for place in range(given.prompt_tokens, len(row)):
                first = place % len(names)
                for name in (*names[first:], *names[:first]):
                    player = players[name]
                    began, charged = player.watch(), player.runtime.virtual_seconds
                    output = player.feed(row[None, place : place + 1], caches[name])
                    waited = player.runtime.virtual_seconds - charged
                    stalled[name] += waited
                    seconds[name] += player.watch() - began + waited
                    logits[name].append(output.logits[0, -1])
    return {
        name: Decoded(
            seconds=seconds[name], stall_seconds=stalled[name], logits=torch.stack(logits[name])
        )
        for name in names
    }
