"""What quality bounds are worth: concurrency, tokens and good answers per second at equal memory.

    make bench-progressive
    make bench-progressive BENCH_PROGRESSIVE_ARGS="--rates 0.05 0.5 --json runs/progressive.json"

A small model that recalls (workload.py; trained first where there is none) answers mixes of easy
and hard requests within a budget of fast memory for keys and values, by

- ``full``: pages of full precision, given room by 16 tokens as texts grow
- ``static K6V5`` and ``static K4V4``: such pages for all, and no guarantee
- ``calibrated``: a compact tier where the bound of a calibration (delta 5 %) is within epsilon,
  else full
- ``verified``: drafts from the compact tier, checked by passes over originals on disk

Hard requests are those of the pool whose calibrated bound at the compact tier is above epsilon, so
a mix has the escalation rate p by construction; *identity* is 1/(c + (1 - c) p) with c the compact
tier's share of full bytes, on average while a text grows. Requests that have memory and wait for
more count in no concurrency. A *good* answer has a measured mean KL within epsilon, and counts by
the share of its tokens that came while it was watched. Tables first; the last line of stdout is one
JSON document.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, output_file, run_main
from lib.commands.flags import whole_number
from lib.evaluation.calibrate_requests import calibrate_requests
from lib.evaluation.measured_requests import expected_concurrency, measure_requests
from lib.files import check_writable, write_json
from lib.machine import cpu_name
from lib.precision.binomial import proportion_interval
from lib.progressive.bounds import QualityBound
from lib.progressive.calibration import Calibration
from lib.progressive.engine import Engine
from lib.progressive.estimators import predict_damage
from lib.progressive.generation import GenerationRequest
from lib.progressive.ladder import Ladder, make_ladder
from scripts.experiments.progressive.loads import Saturated, arrive, curve, saturate
from scripts.experiments.progressive.workload import KINDS, load_or_train, make_requests

DELTA = 0.05
RATES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
STATIC = ("K4V4", "K6V5")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SYSTEMS = ("full", "static K6V5", "static K4V4", "calibrated", "verified")
_AT_ONCE = 24
"""Answers that are measured at a time."""
_LOAD = 0.7
"""Of what ``full`` finishes a second: the rate of Poisson arrivals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """A request, and what is known of it."""

    request: GenerationRequest
    measured: dict[str, float]
    """Of each static system, and of the compact tier: mean nats per token."""
    bound: float
    """Calibrated, of the compact tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What all runs share."""

    model: Any
    static: Ladder
    """Tiers that are alike in all layers."""
    compact: Ladder
    """The calibration's compact tier, and full."""
    calibration: Calibration | None
    pool: list[Pooled]
    epsilon: float
    budget: int
    context: int
    clients: int

    def engine(
        self, ladder: Ladder | None = None, *, budget: int | None = None, rate: float = 0.0
    ) -> Engine:
        """Return an engine of this study; ``rate``: of climbs, that it has seen."""
        return Engine(
            self.model,
            kv_budget=budget or self.budget,
            ladder=ladder or self.compact,
            context=self.context,
            calibration=self.calibration if ladder is None else None,
            audited_share=1e-9,  # answers are measured apart, so that no run pays for it
            prefix_bytes=0,  # no two requests begin alike
            history={"calibrated": (round(100 * rate), 100)},
            max_queue=100_000,
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    check_writable(args.plot)
    torch.manual_seed(0)
    study = prepare(args)
    document = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **run(study, args)}
    print_tables(document)
    if args.plot is not None:
        from scripts.experiments.progressive.study_plot import draw

        draw(document, args.plot)
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document))
    return 0


def prepare(args: argparse.Namespace) -> Study:
    """Calibrate, measure the pool, and choose epsilon so that half of it is hard."""
    if args.chat_model is not None:
        model, drawn = draw_documents(args)
    else:
        model, _ = load_or_train(args.model)
        drawn = draw_requests(args.calibration + args.pool, args.new_tokens, easy=args.easy)
    calibrating, pooled = drawn[: args.calibration], drawn[args.calibration :]
    longest = max(len(each.prompt) + each.max_new_tokens for each in drawn)
    room = 2**30
    if "calibrated" not in args.systems and args.epsilon is not None:
        return uncalibrated(model, pooled, longest, args)
    print(f"calibrating on {len(calibrating)} requests", file=sys.stderr)
    calibration = calibrate_requests(
        model, calibrating, kv_budget=room, tiers=args.compact, context=longest
    )
    compact = calibration.ladder
    static = make_ladder(compact.shape).restrict(" ".join(STATIC))
    print(f"measuring {len(pooled)} requests", file=sys.stderr)
    rows = []
    for ladder in (compact, static)[: 1 + any(name.startswith("static") for name in args.systems)]:
        with Engine(
            model, kv_budget=room, ladder=ladder, context=longest, prefix_bytes=0
        ) as engine:
            fixed_bytes = engine.fixed_bytes
            rows.append(measure_requests(engine, pooled, ladder.full, at_once=_AT_ONCE))
    factor = calibration.factor(DELTA)
    pool = []
    for request, own, *others in zip(pooled, *rows, strict=True):
        predicted = predict_damage(calibration.information, own.errors[0], own.prompt_tokens)
        measured = {"compact": own.measured[0]}
        for each in others:
            measured.update(zip((f"static {name}" for name in STATIC), each.measured, strict=True))
        pool.append(Pooled(request=request, measured=measured, bound=factor * predicted))
    epsilon = args.epsilon or median(each.bound for each in pool)
    full = compact.num_bytes(compact.full, longest)
    return Study(
        model=model,
        static=static,
        compact=compact,
        calibration=calibration,
        pool=pool,
        epsilon=epsilon,
        budget=fixed_bytes + args.fit * full,
        context=longest,
        clients=args.requests,
    )


def uncalibrated(
    model: Any, pooled: Sequence[GenerationRequest], longest: int, args: argparse.Namespace
) -> Study:
    """Return a study of systems that need no calibration: all requests are alike then."""
    with Engine(model, kv_budget=2**30, context=longest) as engine:
        fixed_bytes = engine.fixed_bytes
        compact = engine.ladder.restrict(args.compact)
    return Study(
        model=model,
        static=compact,
        compact=compact,
        calibration=None,
        pool=[Pooled(request=each, measured={}, bound=0.0) for each in pooled],
        epsilon=args.epsilon,
        budget=fixed_bytes + args.fit * compact.num_bytes(compact.full, longest),
        context=longest,
        clients=args.requests,
    )


def draw_requests(count: int, new_tokens: int, *, easy: bool = False) -> list[GenerationRequest]:
    """Draw requests of all kinds and difficulties, none twice; or ``easy``, short ones."""
    draw = random.Random(1)
    requests = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        (item,) = make_requests(
            kind, draw.choice((0.0, 0.25, 0.5, 0.75, 1.0)), 1, draw.randrange(2**31)
        )
        requests.append(GenerationRequest(prompt=item.prompt, max_new_tokens=new_tokens))
    return requests


def draw_documents(args: argparse.Namespace) -> tuple[Any, list[GenerationRequest]]:
    """Return a chat model and requests about documents of the Python library."""
    from lib.checkpoint.models import load_model
    from lib.text.held_out import load_tokenizer
    from scripts.experiments.progressive.first_adequate_tier import read_documents

    model = load_model(args.chat_model).eval().to(DTYPES[args.dtype])
    tokenizer = load_tokenizer(str(args.chat_model))
    documents = read_documents(tokenizer, args.calibration + args.pool, seed=1)
    requests = [
        GenerationRequest(prompt=ids[-args.prompt_tokens :], max_new_tokens=args.new_tokens)
        for _, ids in documents
    ]
    return model, requests


def run(study: Study, args: argparse.Namespace) -> dict[str, Any]:
    """Run the curve, every system at every rate, and arrivals."""
    requests = [each.request for each in study.pool]
    counts = tuple(count for count in (1, 2, 4, 8, 16, 32) if count <= args.most)
    print("tokens per second against concurrency", file=sys.stderr)
    flat = curve(lambda: study.engine(budget=2**30), requests, counts)
    share = compact_share(study.compact, requests)
    points = []
    for rate in args.rates:
        mix = draw_mix(study, rate)
        for system in args.systems:
            point = run_system(study, system, mix, rate)
            print(f"p {rate}: {system} {json.dumps(point)}", file=sys.stderr, flush=True)
            points.append({"p": rate, "system": system, **point, "identity": 0.0})
    base = {p["p"]: p["concurrency"] for p in points if p["system"] == "full"}
    for point in points:
        point["identity"] = expected_concurrency(share, point["p"])
        point["concurrency_ratio"] = point["concurrency"] / base[point["p"]]
    arrivals = [] if args.no_arrivals else run_arrivals(study, points)
    return {
        "compact_fraction": share,
        "compact_tier": study.compact.names[0],
        "dtype": str(study.model.dtype).removeprefix("torch."),
        "epsilon": study.epsilon,
        "delta": DELTA,
        "kv_budget": study.budget,
        "new_tokens": requests[0].max_new_tokens,
        "curve": flat,
        "points": points,
        "arrivals": arrivals,
        "ratios": ratios(points),
    }


def compact_share(ladder: Ladder, requests: Sequence[GenerationRequest]) -> float:
    """Return the compact tier's share of full bytes, both on average while texts grow."""

    def mean_bytes(tier: int, request: GenerationRequest) -> float:
        start = len(request.prompt)
        lengths = range(start, start + request.max_new_tokens)
        return mean(ladder.num_bytes(tier, length) for length in lengths)

    compact, full = (sum(mean_bytes(tier, each) for each in requests) for tier in (0, 1))
    return compact / full


def draw_mix(study: Study, rate: float) -> list[Pooled]:
    """Draw requests of which a share ``rate`` is hard."""
    draw = random.Random(int(1000 * rate))
    hard = [each for each in study.pool if each.bound > study.epsilon] or study.pool
    easy = [each for each in study.pool if each.bound <= study.epsilon]
    count = round(rate * study.clients)
    mix = draw.choices(hard, k=count) + draw.choices(easy, k=study.clients - count)
    draw.shuffle(mix)
    return mix


def bounded(study: Study, system: str, mix: Sequence[Pooled]) -> list[GenerationRequest]:
    """Return the requests as a system gets them."""
    bound = {
        "calibrated": QualityBound(epsilon=study.epsilon, delta=DELTA),
        "verified": QualityBound(epsilon=study.epsilon),
    }.get(system)
    return [replace(each.request, bound=bound) for each in mix]


def tier_of(study: Study, system: str) -> tuple[Ladder, int | None]:
    """Return the ladder of a system, and the tier that it gives to all."""
    if not system.startswith("static"):
        return study.compact, None
    return study.static, study.static.index(system.split()[1])


def run_system(study: Study, system: str, mix: Sequence[Pooled], rate: float) -> dict[str, Any]:
    """Run one system on one mix, saturated."""
    ladder, tier = tier_of(study, system)
    with study.engine(None if tier is None else ladder, rate=rate) as engine:
        found = saturate(engine, bounded(study, system, mix), tier=tier)
    assert found.stats.most_kv_bytes <= study.budget, "the budget was passed"
    return describe(study, system, mix, found)


def describe(study: Study, system: str, mix: Sequence[Pooled], found: Saturated) -> dict[str, Any]:
    """Return the figures of a run."""
    outcomes = [answer.result() for answer in found.answers]
    errors = []
    for each, outcome in zip(mix, outcomes, strict=True):
        if outcome.quality.tier == "full":
            errors.append(0.0)
        elif system == "verified":
            errors.append(outcome.quality.bound)
        else:
            errors.append(each.measured.get(system, each.measured["compact"]))
    good = [error <= study.epsilon for error in errors]
    shares = [n / o.new_tokens for n, o in zip(found.tokens, outcomes, strict=True)]
    violations, count = len(good) - sum(good), len(good)
    low, high = proportion_interval(violations, count)
    return {
        "concurrency": found.concurrency,
        "tokens_per_s": sum(found.tokens) / found.seconds,
        "goodput": sum(shares[index] for index, is_good in enumerate(good) if is_good)
        / found.seconds,
        "fast_bytes": mean(outcome.quality.kv_bytes for outcome in outcomes),
        "total_bytes": mean(outcome.quality.total_bytes for outcome in outcomes),
        "most_kv_bytes": found.stats.most_kv_bytes,
        "escalated": mean(outcome.quality.escalations > 0 for outcome in outcomes),
        "wasted_tokens": sum(outcome.rejected_tokens for outcome in outcomes)
        / sum(outcome.new_tokens for outcome in outcomes),
        "violations": violations,
        "violations_interval": [low, high],
        "n": count,
    }


def run_arrivals(study: Study, points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run Poisson arrivals at a rate that full precision can serve, on the mix of the fewest
    hard requests, and add the latencies to the points of that mix.
    """
    rate = min(point["p"] for point in points)
    (full,) = [p for p in points if p["p"] == rate and p["system"] == "full"]
    per_second = _LOAD * full["tokens_per_s"] / study.pool[0].request.max_new_tokens
    mix = draw_mix(study, rate)[: max(20, study.clients // 2)]
    arrivals = []
    for system in dict.fromkeys(point["system"] for point in points):
        print(f"arrivals: {system}", file=sys.stderr)
        ladder, tier = tier_of(study, system)
        with study.engine(None if tier is None else ladder) as engine:
            latencies = arrive(
                engine, bounded(study, system, mix), rate=per_second, seed=3, tier=tier
            )
        arrivals.append({"system": system, "p": rate, "requests_per_s": per_second, **latencies})
        for point in points:
            if point["system"] == system and point["p"] == rate:
                point["ttft_p95_s"] = latencies["ttft_p95_s"]
    return arrivals


def ratios(points: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return goodput and tokens per second over full precision, where the fewest are hard."""
    rate = min(point["p"] for point in points)
    found = {point["system"]: point for point in points if point["p"] == rate}
    return {
        f"{system}_{name}": found[system][name] / found["full"][name]
        for system in ("verified", "calibrated")
        if system in found
        for name in ("goodput", "tokens_per_s")
    }


def print_tables(document: dict[str, Any]) -> None:
    """Print what was found, for a person."""
    print(f"compact tier {document['compact_tier']}: {document['compact_fraction']:.3f} of full")
    print(f"epsilon {document['epsilon']:.4g} nats per token, delta {document['delta']}")
    for point in document["curve"]:
        print(f"  {point['concurrency']:>3} at a time: {point['tokens_per_s']:8.1f} tokens/s")
    print(
        f"{'p':>5} {'system':<12}{'conc.':>7}{'ratio':>7}{'ident.':>7}{'tok/s':>8}{'good/s':>8}"
        f"{'fast KiB':>10}{'total KiB':>10}{'climbed':>8}{'wasted':>7}{'above':>10}"
    )
    for p in document["points"]:
        print(
            f"{p['p']:>5} {p['system']:<12}{p['concurrency']:>7.1f}{p['concurrency_ratio']:>7.2f}"
            f"{p['identity']:>7.2f}{p['tokens_per_s']:>8.1f}{p['goodput']:>8.2f}"
            f"{p['fast_bytes'] / 1024:>10.0f}{p['total_bytes'] / 1024:>10.0f}"
            f"{p['escalated']:>8.2f}{p['wasted_tokens']:>7.2f}{p['violations']:>5}/{p['n']}"
        )
    for each in document["arrivals"]:
        print(
            f"  {each['system']:<12} first token {each['ttft_p50_s']:.3f} s (p95 "
            f"{each['ttft_p95_s']:.3f}), a token {each['tpot_p50_s']:.4f} s "
            f"(p95 {each['tpot_p95_s']:.4f})"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Measure what quality bounds of requests are worth.")
    default = "(default: %(default)s)"
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/progressive-recall"),
        metavar="DIR",
        help=f"of workload.py, trained where there is none {default}",
    )
    parser.add_argument(
        "--chat-model", type=Path, metavar="DIR", help="asked about documents, in its place"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help=f"of the chat model, and of its keys and values in full {default}",
    )
    for name, value, what in (
        ("--prompt-tokens", 320, "of a prompt about a document, at most"),
        ("--calibration", 60, "requests to calibrate on"),
        ("--pool", 60, "requests to draw mixes of"),
        ("--requests", 48, "requests of a mix"),
        ("--new-tokens", 96, "tokens of an answer"),
        ("--most", 32, "requests at a time of the curve"),
        ("--fit", 3, "of the longest requests, that fit the budget in full"),
    ):
        parser.add_argument(
            name, type=whole_number(1), default=value, metavar="N", help=f"{what} {default}"
        )
    parser.add_argument("--compact", default="K6V5", metavar="TIER", help=f"compact tier {default}")
    parser.add_argument(
        "--epsilon",
        type=float,
        metavar="NATS",
        help="per token (default: the median of the pool's calibrated bounds)",
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=SYSTEMS,
        metavar="SYSTEM",
        help="to run: full is always one of them (default: all)",
    )
    parser.add_argument(
        "--easy", action="store_true", help="short documents alone: answers are most of the work"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, metavar="P", help=f"of hard ones {default}"
    )
    parser.add_argument("--no-arrivals", action="store_true", help="leave Poisson arrivals out")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="the document, in a file")
    parser.add_argument("--plot", type=output_file, metavar="FILE", help="a picture")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
