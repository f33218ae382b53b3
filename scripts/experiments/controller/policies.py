"""Each policy in the engine, with a share of a mixture's experts in fast memory, and the bounds."""

import contextlib
import copy
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lib.errors import InputError
from lib.policy.experts import ExpertCache
from lib.policy.experts.bounds import belady_misses, least_seconds
from lib.policy.experts.simulate import Machine, simulate_decode
from lib.tiering import EmulationSpec, Runtime, attach
from lib.tiering.transfer.emulation import EmulatedTime
from scripts.experiments.controller.budgets import (
    make_plan,
    make_spec,
    measure_experts,
    smallest_budget,
)
from scripts.experiments.controller.decoding import Decoded, Given, decode
from scripts.experiments.controller.routing import Recording, record
from scripts.experiments.controller.turns import Player, Stopwatch, decode_in_turn

POLICIES = ("ours", "ours_on_demand", "lru", "lfu", "popularity")
_GROUP_SHARE = 0.3


class Bench:
    """A model, its text, and what was measured of it before anything moves."""

    def __init__(
        self, model: Any, given: Given, hints: Path | None, reference: Tensor, rounds: int
    ) -> None:
        self._model = model
        self._given = given
        self._hints = hints
        self._reference = reference
        self._rounds = rounds
        self.outputs_equal = True
        self.expert_bytes, self._experts, self._layers = measure_experts(model, hints)
        self.layer_seconds = 1.0
        self.layer_seconds, self.recording = self._measure_compute()

    def run_share(self, share: float, ratios: Sequence[float]) -> dict[float, dict[str, Any]]:
        """Return by x/c what each policy did with a share of the experts in fast memory."""
        slots = max(round(share * self._experts), 1)
        budget, cache = self._budget(slots)
        found: dict[float, dict[str, Any]] = {}
        with contextlib.ExitStack() as stack:
            players = {policy: self._play(stack, policy, budget) for policy in POLICIES}
            decode_in_turn(players, self._given)
            self.layer_seconds = self._computing(decode_in_turn(players, self._given)["lru"])
            for ratio in ratios:
                for player in players.values():
                    player.runtime.emulation = self._spec(ratio)
                found[ratio] = self._run_in_turn(players)
                found[ratio] |= self._bounds(players["ours"].runtime, ratio, found[ratio]["lru"])
                found[ratio]["cache_bytes"] = cache
        return found

    def run_group(self, ratio: float) -> dict[str, Any]:
        """Compare experts one by one with each layer's experts as one group, on the same link."""
        budget, _ = self._budget(max(round(_GROUP_SHARE * self._experts), 1))
        rates = {}
        with mock.patch("lib.tiering.payload.groups.takes_single_experts", return_value=False):
            # Two layers' experts must fit beside the rest, or no plan streams them.
            smallest = smallest_budget(self._model, self._hints, self._spec(ratio))
            budget = max(budget, smallest)
            with self._attach(budget, self._spec(ratio)) as runtime:
                self._use_clock(runtime)
                rates["group"] = self._rate(runtime)
        with self._attach(budget, self._spec(ratio)) as runtime:
            self._use_clock(runtime)
            rates["one_by_one"] = self._rate(runtime)
        return {
            "x_over_c": ratio,
            "budget_bytes": budget,
            **{name: {"tokens_per_s": rate} for name, rate in rates.items()},
            "ratio": rates["one_by_one"] / rates["group"],
        }

    def run_disk(self, share: float, spill_dir: Path) -> dict[str, Any]:
        """Return what each policy does on a real disk, with the x/c that it turns out to have."""
        budget, _ = self._budget(max(round(share * self._experts), 1))
        with attach(
            self._model, self._hints, budget={"HBM": budget, "SSD": None}, spill_dir=spill_dir
        ) as runtime:
            decode(self._model, self._given)
            slots = runtime._keeper.residency.experts
            found = self._run_policies(runtime)
            reads = list(slots.foresight._read_seconds.values())
        seconds = statistics.mean(reads)
        return {"resident": share, "x_over_c": seconds / self.layer_seconds, **found}

    def _run_policies(self, runtime: Runtime) -> dict[str, Any]:
        runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
        for turn in range(self._rounds):
            for policy in POLICIES if turn % 2 == 0 else reversed(POLICIES):
                self._choose(runtime, policy)
                runs[policy].append(self._run(runtime))
        return {policy: min(each, key=_seconds_per_token) for policy, each in runs.items()}

    def _choose(self, runtime: Runtime, policy: str) -> None:
        """Let a policy decide from an empty cache on."""
        slots = runtime._keeper.residency.experts
        lookahead = runtime._keeper.forwards.lookahead
        slots.policy = policy.removesuffix("_on_demand")
        slots.free()
        slots.adopt(runtime.plan)
        lookahead.remove()
        if policy == "ours":
            lookahead.follow()

    def _run(self, runtime: Runtime) -> dict[str, Any]:
        runtime.reset_stats()
        return self._figures(runtime, [decode(self._model, self._given, runtime)])

    def _play(self, stack: contextlib.ExitStack, policy: str, budget: int) -> Player:
        """Attach to a copy of the model, with a link on which nothing is waited for."""
        model = copy.deepcopy(self._model)
        runtime = stack.enter_context(self._attach(budget, self._spec(1e-9), model))
        self._choose(runtime, policy)
        return Player(model=model, runtime=runtime, watch=Stopwatch(self._given.clock))

    def _computing(self, done: Decoded) -> float:
        """Return the seconds of computing per layer and token."""
        seconds = done.seconds - done.stall_seconds
        return seconds / self._given.num_decoded / self._layers

    def _run_in_turn(self, players: Mapping[str, Player]) -> dict[str, Any]:
        """Return each policy's figures over all rounds, each of them from an empty cache."""
        runs: dict[str, list[Decoded]] = {policy: [] for policy in players}
        for player in players.values():
            player.runtime.reset_stats()
        for _ in range(self._rounds):
            for policy, player in players.items():
                self._choose(player.runtime, policy)
            for policy, done in decode_in_turn(players, self._given).items():
                runs[policy].append(done)
        return {
            policy: self._figures(player.runtime, runs[policy])
            for policy, player in players.items()
        }

    def _figures(self, runtime: Runtime, runs: Sequence[Decoded]) -> dict[str, Any]:
        """Return what runs since the last reset of the statistics were like."""
        for done in runs:
            self.outputs_equal &= torch.equal(done.logits, self._reference)
        tokens = self._given.num_decoded * len(runs)
        stats = runtime.stats().experts
        assert stats is not None
        read = stats.reads + stats.useful + stats.wasted
        covered = stats.useful + stats.reads
        return {
            "resident_hit": stats.resident / stats.uses,
            "ready_hit": stats.ready / stats.uses,
            "bytes": read * self.expert_bytes / tokens,
            "tokens_per_s": tokens / sum(done.seconds for done in runs),
            "stall_s": sum(done.stall_seconds for done in runs) / tokens,
            "reads": stats.reads,
            "predicted": stats.predicted,
            "useful": stats.useful,
            "wasted": stats.wasted,
            "miss_coverage": stats.useful / covered if covered else None,
            "wasted_per_useful": stats.wasted / stats.useful if stats.useful else None,
        }

    def _bounds(self, runtime: Runtime, ratio: float, lru: dict[str, Any]) -> dict[str, Any]:
        """Return what could be, with the computing of ``lru`` in the same run."""
        cache = runtime._keeper.residency.experts.cache
        assert cache is not None
        tokens = self._given.num_decoded
        calls = self.recording.calls
        misses = belady_misses(calls, cache.capacity_bytes // self.expert_bytes)
        compute = tokens * (1 / lru["tokens_per_s"] - lru["stall_s"])
        transfer = ratio * self.layer_seconds
        seconds = least_seconds(
            compute, misses * self.expert_bytes, bytes_per_second=self.expert_bytes / transfer
        )
        uses = sum(len(call.tokens[0]) for call in calls if call.decode)
        machine = Machine(
            seconds_per_byte=transfer / self.expert_bytes,
            compute_seconds=compute / tokens / self._layers,
        )
        simulated = simulate_decode(
            calls, self._cache_like(cache), machine, guesses=self.recording.guesses()
        )
        return {
            "bound": {
                "resident_hit": 1 - misses / uses,
                "ready_hit": None,
                "bytes": misses * self.expert_bytes / tokens,
                "tokens_per_s": tokens / seconds,
                "stall_s": (seconds - compute) / tokens,
            },
            "ceiling": {
                "resident_hit": simulated.resident_hit,
                "ready_hit": simulated.ready_hit,
                "bytes": simulated.bytes_read / tokens,
                "tokens_per_s": tokens / simulated.seconds,
                "stall_s": simulated.stall_seconds / tokens,
            },
        }

    def _cache_like(self, cache: ExpertCache) -> ExpertCache:
        """Return a cache as ``ours`` begins with, of the same sizes and capacity."""
        per_token = {call.layer: len(call.tokens[0]) for call in self.recording.calls}
        return ExpertCache(cache.sizes, cache.capacity_bytes, per_token=per_token, spare=True)

    def _rate(self, runtime: Runtime) -> float:
        decode(self._model, self._given)
        runs = []
        for _ in range(self._rounds):
            runtime.reset_stats()
            done = decode(self._model, self._given, runtime)
            self.outputs_equal &= torch.equal(done.logits, self._reference)
            runs.append(done.seconds)
        return self._given.num_decoded / min(runs)

    def _measure_compute(self) -> tuple[float, Recording]:
        """Return a layer's seconds in the engine with nothing to wait for, and the routing."""
        budget, _ = self._budget(self._experts // 2)
        with self._attach(budget, self._spec(1e-9)) as runtime:
            self._use_clock(runtime)
            decode(self._model, self._given)
            recording = record(runtime, lambda: decode(self._model, self._given))
            self._choose(runtime, "ours_on_demand")
            rates = self._rate(runtime)
        return 1 / (rates * self._layers), recording

    def _attach(self, budget: int, spec: EmulationSpec, model: Any = None) -> Runtime:
        return attach(
            self._model if model is None else model,
            self._hints,
            budget={"HBM": budget, "SSD": None},
            mode="emulated",
            emulation=spec,
        )

    def _use_clock(self, runtime: Runtime) -> None:
        charges = runtime._keeper.memory.charges
        assert isinstance(charges, EmulatedTime)
        charges.clock = self._given.clock

    def _spec(self, ratio: float) -> EmulationSpec:
        return make_spec(self.expert_bytes / (ratio * self.layer_seconds))

    def _budget(self, slots: int) -> tuple[int, int]:
        """Return the budget whose plan has a cache of so many experts, and one to pass others."""
        wanted = (slots + 1) * self.expert_bytes
        weights = sum(each.numel() * each.element_size() for each in self._model.parameters())
        budget = weights - self._experts * self.expert_bytes + wanted
        for _ in range(8):
            made = make_plan(self._model, self._hints, budget, self._spec(1.0))
            if made.cache_bytes == wanted:
                return budget, wanted
            budget += wanted - made.cache_bytes
        raise InputError(f"no plan has a cache of {slots} experts: give other shares")


def _seconds_per_token(figures: dict[str, Any]) -> float:
    return 1 / float(figures["tokens_per_s"])
