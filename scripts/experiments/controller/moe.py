"""Decode a trained mixture with a share of its experts in fast memory, under several policies.

    python scripts/experiments/controller/moe.py --model runs/moe-quickstart/checkpoint

The text is given: held-out tokens are fed one by one after a prompt, so that every policy meets the
same routing, and outputs are compared bit for bit. All policies run in the engine; only the
choice of what stays differs, and whether anything is read ahead. The link is emulated on a virtual
clock, with the bandwidth at which an expert's transfer takes x times a layer's compute c (measured
in the engine, with nothing to wait for): seconds are those of computing and those charged.
``--spill-dir`` adds a run on a real disk.

Two bounds, not to be taken for one another: ``bound`` reads Belady's bytes and hides all it can
(no policy is faster); ``ceiling`` is what the simulator makes of the engine's own predictions, each
known a whole layer before, with costless predicting.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import Parser, emit, run_main
from lib.commands.flags import whole_number
from lib.errors import InputError
from lib.policy.experts import ExpertCache
from lib.policy.experts.bounds import belady_misses, least_seconds
from lib.policy.experts.simulate import Machine, simulate_decode
from lib.text.held_out import read_text
from lib.text.parts import vocabulary_size
from lib.tiering import EmulationSpec, Runtime, TierSpec, attach, plan
from lib.tiering.transfer.emulation import EmulatedTime
from lib.vocabulary import Tier
from scripts.experiments.controller.routing import Recording, record

SHARES = (0.05, 0.1, 0.2, 0.3, 0.4)
RATIOS = (0.25, 0.5, 1.0, 2.0)
POLICIES = ("ours", "ours_on_demand", "lru", "lfu", "popularity")
_MAIN_RATIO = 1.0
_GROUP_SHARE = 0.3


@dataclass(slots=True, kw_only=True)
class Given:
    """What is decoded: tokens (N, T), of which so many are each row's prompt; seconds are of
    ``clock``, the wall's or the thread's own.
    """

    tokens: Tensor
    prompt_tokens: int
    clock: Callable[[], float]

    @property
    def num_decoded(self) -> int:
        """Tokens that are fed one by one."""
        rows, length = self.tokens.shape
        return int(rows * (length - self.prompt_tokens))


@dataclass(slots=True, kw_only=True)
class Decoded:
    """Seconds of the decode steps, computing and charged, and the logits (steps, vocabulary)."""

    seconds: float
    stall_seconds: float
    logits: Tensor


def run_moe(
    model: Any,
    given: Given,
    *,
    hints: Path | None = None,
    shares: Sequence[float] = SHARES,
    ratios: Sequence[float] = RATIOS,
    rounds: int = 3,
    spill_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Return the figures of the contract at x/c = 1 (else the first of ``ratios``), and under
    ``ratios`` those of all. Raises InputError for a model whose experts don't move one by one.
    """
    reference = decode(model, given).logits
    bench = Bench(model, given, hints, reference, rounds)
    main = _MAIN_RATIO if _MAIN_RATIO in ratios else ratios[0]
    found: dict[str, Any] = {
        "x_over_c": main,
        "layer_compute_s": bench.layer_seconds,
        "expert_bytes": bench.expert_bytes,
        "decoded_tokens": given.num_decoded,
        "rounds": rounds,
        "resident": {},
        "ratios": {str(ratio): {} for ratio in ratios},
    }
    for share in shares:
        by_ratio = bench.run_share(share, ratios)
        for ratio, figures in by_ratio.items():
            found["ratios"][str(ratio)][str(share)] = figures
            say(f"\n{_lines(share, ratio, figures)}")
        found["resident"][str(share)] = by_ratio[main]
    middle = min(shares, key=lambda share: abs(share - 0.2))
    ahead = found["resident"][str(middle)]["ours"]
    recording = bench.recording
    found["lookahead"] = {
        "slot_recall": recording.share(recording.recall),
        "slot_recall_without_first_layer": recording.share(recording.recall, first=1),
        "control_recall": recording.share(recording.control),
        "miss_coverage": ahead["miss_coverage"],
        "wasted_per_useful": ahead["wasted_per_useful"],
        "resident": middle,
    }
    found["outputs_equal"] = bench.outputs_equal
    found["group"] = bench.run_group(main)
    if spill_dir is not None:
        found["disk"] = bench.run_disk(middle, spill_dir)
    return found


def run_share(
    model: Any, given: Given, *, hints: Path | None, share: float, rounds: int
) -> dict[str, Any]:
    """Return and print what each policy does with one share of experts at x/c = 1."""
    bench = Bench(model, given, hints, decode(model, given).logits, rounds)
    figures = bench.run_share(share, [_MAIN_RATIO])[_MAIN_RATIO]
    print(_lines(share, _MAIN_RATIO, figures))
    return {**figures, "outputs_equal": bench.outputs_equal}


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
        with self._attach(budget, self._spec(ratios[0])) as runtime:
            self._use_clock(runtime)
            decode(self._model, self._given)
            for ratio in ratios:
                runtime.emulation = self._spec(ratio)
                found[ratio] = self._run_policies(runtime)
                found[ratio] |= self._bounds(runtime, ratio)
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
        done = decode(self._model, self._given, runtime)
        self.outputs_equal &= torch.equal(done.logits, self._reference)
        tokens = self._given.num_decoded
        stats = runtime.stats().experts
        assert stats is not None
        read = stats.reads + stats.useful + stats.wasted
        covered = stats.useful + stats.reads
        return {
            "resident_hit": stats.resident / stats.uses,
            "ready_hit": stats.ready / stats.uses,
            "bytes": read * self.expert_bytes / tokens,
            "tokens_per_s": tokens / done.seconds,
            "stall_s": done.stall_seconds / tokens,
            "reads": stats.reads,
            "predicted": stats.predicted,
            "useful": stats.useful,
            "wasted": stats.wasted,
            "miss_coverage": stats.useful / covered if covered else None,
            "wasted_per_useful": stats.wasted / stats.useful if stats.useful else None,
        }

    def _bounds(self, runtime: Runtime, ratio: float) -> dict[str, Any]:
        cache = runtime._keeper.residency.experts.cache
        assert cache is not None
        tokens = self._given.num_decoded
        calls = self.recording.calls
        misses = belady_misses(calls, cache.capacity_bytes // self.expert_bytes)
        compute = self.layer_seconds * self._layers * tokens
        transfer = ratio * self.layer_seconds
        seconds = least_seconds(
            compute, misses * self.expert_bytes, bytes_per_second=self.expert_bytes / transfer
        )
        uses = sum(len(call.tokens[0]) for call in calls if call.decode)
        machine = Machine(
            seconds_per_byte=transfer / self.expert_bytes, compute_seconds=self.layer_seconds
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

    def _attach(self, budget: int, spec: EmulationSpec) -> Runtime:
        return attach(
            self._model,
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


def decode(model: Any, given: Given, runtime: Runtime | None = None) -> Decoded:
    """Feed each row's prompt, then its tokens one by one; only the latter are timed."""
    seconds = stalled = 0.0
    logits = []
    with torch.no_grad():
        for row in given.tokens:
            cache = model(input_ids=row[None, : given.prompt_tokens], use_cache=True)
            cache = cache.past_key_values
            began, charged = given.clock(), _stall(runtime)
            for place in range(given.prompt_tokens, len(row)):
                step = model(
                    input_ids=row[None, place : place + 1], past_key_values=cache, use_cache=True
                )
                logits.append(step.logits[0, -1])
            waited = _stall(runtime) - charged
            stalled += waited
            seconds += given.clock() - began
            if runtime is not None and runtime.mode == "emulated":
                seconds += waited
    return Decoded(seconds=seconds, stall_seconds=stalled, logits=torch.stack(logits))


def _stall(runtime: Runtime | None) -> float:
    if runtime is None:
        return 0.0
    if runtime.mode == "emulated":
        return runtime.virtual_seconds
    return runtime.stats().transfer_seconds


def make_spec(bytes_per_second: float) -> EmulationSpec:
    """Return a machine with a link of that speed, where what resides costs nothing more."""
    return EmulationSpec(
        specs={
            Tier.HBM: TierSpec("HBM", 0, 1e6),
            Tier.SSD: TierSpec("link", 0, bytes_per_second / 1e9),
        },
        charge_hbm=False,
    )


def make_plan(model: nn.Module, hints: Path | None, budget: int, spec: EmulationSpec) -> Any:
    """Return the plan of a budget."""
    budgets = {"HBM": budget, "SSD": None}
    return plan(model, hints, budget=budgets, mode="emulated", emulation=spec).plan


def measure_experts(model: Any, hints: Path | None) -> tuple[int, int, int]:
    """Return the bytes of an expert, their number, and that of the layers that have them."""
    with attach(
        model, hints, budget={"HBM": None, "SSD": None}, mode="emulated", emulation=make_spec(1e9)
    ) as runtime:
        packed = runtime._keeper.residency.packed
        sizes = {each.payload.num_bytes for layer in packed for each in layer.experts}
    if len(sizes) != 1:
        raise InputError(
            "the model has no experts that move one by one, or of several sizes: give a mixture "
            "of transformers with packed experts"
        )
    return sizes.pop(), sum(len(layer.experts) for layer in packed), len(packed)


def smallest_budget(model: nn.Module, hints: Path | None, spec: EmulationSpec) -> int:
    """Return a budget with which a plan is found, within 2 %."""
    low, high = 0, sum(each.numel() * each.element_size() for each in model.parameters()) * 2
    while high - low > 0.02 * high:
        middle = (low + high) // 2
        try:
            make_plan(model, hints, middle, spec)
            high = middle
        except InputError:
            low = middle
    return high


def _seconds_per_token(figures: dict[str, Any]) -> float:
    return 1 / float(figures["tokens_per_s"])


def _lines(share: float, ratio: float, figures: dict[str, Any]) -> str:
    lines = [
        f"{share:.0%} of experts resident, x/c = {ratio:g}",
        f"{'':16} {'resident':>8} {'ready':>8} {'KiB/token':>10} {'stall ms':>9} {'tokens/s':>9}",
    ]
    for name in (*POLICIES, "ceiling", "bound"):
        each = figures[name]
        ready = "-" if each["ready_hit"] is None else f"{each['ready_hit']:.1%}"
        lines.append(
            f"{name:16} {each['resident_hit']:>8.1%} {ready:>8} {each['bytes'] / 1024:>10.0f} "
            f"{1e3 * each['stall_s']:>9.2f} {each['tokens_per_s']:>9.1f}"
        )
    return "\n".join(lines)


def read_given(
    model: Any,
    path: str,
    *,
    sequences: int,
    prompt_tokens: int,
    cpu_time: bool = False,
) -> Given:
    """Return held-out text of a checkpoint. ``cpu_time``: on a machine that others use too."""
    text = read_text(
        path,
        None,
        vocab_size=vocabulary_size(model),
        length=int(model.config.max_position_embeddings),
        count=sequences,
        seed=0,
    )
    if text.tokens.shape[1] <= prompt_tokens:
        raise InputError(
            f"the text has {text.tokens.shape[1]} tokens per row, and the prompt is "
            f"{prompt_tokens}: give a shorter one"
        )
    clock = time.thread_time if cpu_time else time.perf_counter
    return Given(tokens=text.tokens, prompt_tokens=prompt_tokens, clock=clock)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_transformers(progress=False)
    model = load_model(args.model).eval()
    given = read_given(
        model,
        args.model,
        sequences=args.sequences,
        prompt_tokens=args.prompt_tokens,
        cpu_time=args.cpu_time,
    )
    found = run_moe(
        model,
        given,
        hints=args.tier_hints,
        shares=args.resident,
        ratios=args.ratios,
        rounds=args.rounds,
        spill_dir=args.spill_dir,
    )
    emit(summary(found), found, args.json)
    return 0


def summary(found: dict[str, Any]) -> str:
    """Return what the tables don't say."""
    ahead, group = found["lookahead"], found["group"]
    lines = [
        f"look-ahead: recall {ahead['slot_recall']:.1%} ("
        f"{ahead['slot_recall_without_first_layer']:.1%} without the first layer, "
        f"{ahead['control_recall']:.1%} with the router's true input); at "
        f"{ahead['resident']:.0%} resident {_share(ahead['miss_coverage'])} of misses foreseen, "
        f"{_share(ahead['wasted_per_useful'])} wasted per useful",
        f"one by one {group['one_by_one']['tokens_per_s']:.1f} tokens/s, as a group "
        f"{group['group']['tokens_per_s']:.1f}: {group['ratio']:.2f} times",
        f"outputs equal: {found['outputs_equal']}",
    ]
    if "disk" in found:
        lines.append(_lines_of_disk(found["disk"]))
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _lines_of_disk(disk: dict[str, Any]) -> str:
    rates = ", ".join(f"{name} {disk[name]['tokens_per_s']:.1f}" for name in POLICIES)
    return f"on the disk (x/c = {disk['x_over_c']:.2f}), tokens/s: {rates}"


def _numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--tier-hints", type=Path, metavar="FILE", help="its hints")
    parser.add_argument(
        "--resident", type=_numbers, default=list(SHARES), metavar="S,...", help="shares of experts"
    )
    parser.add_argument(
        "--ratios", type=_numbers, default=list(RATIOS), metavar="X,...", help="values of x/c"
    )
    parser.add_argument("--sequences", type=whole_number(1), default=4, help="of held-out text")
    parser.add_argument("--prompt-tokens", type=whole_number(1), default=16, help="of each")
    parser.add_argument(
        "--rounds", type=whole_number(1), default=3, help="of which the best counts"
    )
    parser.add_argument("--threads", type=whole_number(1), default=1, help="of torch")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the thread's own time, on a shared machine"
    )
    parser.add_argument("--spill-dir", type=Path, metavar="FOLDER", help="a run on this disk too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
