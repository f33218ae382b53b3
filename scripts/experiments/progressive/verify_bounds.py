"""Whether quality bounds hold: thousands of verified requests, and calibrations tried on others.

    python scripts/experiments/progressive/verify_bounds.py --verified 10000 --json runs/bounds.json

Every answer is measured by a pass of its own over the full model, apart from the passes that
verified it. *Verified*: requests of the recall tasks under four epsilons and ``exact``; an answer
above its epsilon (beyond rounding, 1e-5 nats), or of other tokens than full precision's where it is
exact, is counted, and makes the exit code 1. *Calibrated*: 20 calibrations of 59 requests each,
drawn anew, are tried on 600 others at three epsilons; exit code 1 where more than one of 20 has
a violation rate significantly above delta. *Shift*: a calibration of one kind of document serves
another; the audit says after how many requests it stops.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from statistics import quantiles
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, output_file, run_main
from lib.commands.flags import whole_number
from lib.evaluation.calibrate_requests import measure_damage
from lib.evaluation.measured_requests import (
    RequestRow,
    make_calibration,
    measure_requests,
    try_calibration,
)
from lib.files import check_writable, write_json
from lib.precision.binomial import proportion_interval
from lib.progressive.audit import RequestAudit
from lib.progressive.bounds import Metric, QualityBound
from lib.progressive.calibration import KEYS, Calibration
from lib.progressive.engine import Engine
from lib.progressive.estimators import mean_information
from lib.progressive.generation import GenerationRequest
from lib.progressive.ladder import Ladder, make_ladder
from lib.progressive.measuring import Measurement
from scripts.experiments.progressive.workload import KINDS, load_or_train, make_requests

EPSILONS = (0.001, 0.01, 0.05, 0.2)
EXACT = QualityBound(metric=Metric.EXACT)
DELTA = 0.05
TIERS = "K3V2 K4V4 K6V5"
_ROUNDING = 1e-5
"""Nats: passes of other shapes add up in another order."""
_ROOM = 2**30
_AT_ONCE = 24


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    torch.manual_seed(0)
    model, _ = load_or_train(args.model)
    document = {
        "verified": run_verified(model, args.verified),
        **run_calibrated(model, args.calibrations, args.unseen),
    }
    for name, figures in document.items():
        print(name, json.dumps(figures, indent=1))
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document))
    verified, calibrated = document["verified"], document["calibrated"]
    allowed = len(calibrated["trials"]) // 20
    failed = verified["above"] or verified["other_tokens"]
    return int(bool(failed) or calibrated["significantly_above"] > allowed)


def run_verified(model: Any, count: int) -> dict[str, Any]:
    """Answer short requests under verified bounds, and measure each answer apart."""
    requests = list(short_requests(count))
    above = other = tokens = rejected = 0
    nearest = 0.0
    with Engine(model, kv_budget=_ROOM, ladder=TIERS, prefix_bytes=0) as engine:
        for index, found in measure_all(engine, requests, "verified"):
            bound = requests[index].bound
            assert bound is not None
            tokens += len(found.tokens)
            if bound.metric is Metric.EXACT:
                full = answer_in_full(engine, requests[index])
                other += found.tokens != full
                continue
            above += found.mean > bound.epsilon + _ROUNDING
            nearest = max(nearest, found.mean / bound.epsilon)
            rejected += abs(found.mean - found.quality.bound) > _ROUNDING
    return {
        "requests": count,
        "tokens": tokens,
        "epsilons": list(EPSILONS),
        "exact": sum(each.bound == EXACT for each in requests),
        "above": above,
        "other_tokens": other,
        "said_otherwise": rejected,
        "largest_share_of_epsilon": nearest,
    }


def short_requests(count: int) -> Iterator[GenerationRequest]:
    """Yield requests of all kinds and bounds in turn."""
    draw = random.Random(7)
    bounds = [*(QualityBound(epsilon=epsilon) for epsilon in EPSILONS), EXACT]
    for number in range(count):
        prompt = short_prompt(KINDS[number % len(KINDS)], draw)
        bound = bounds[number // len(KINDS) % len(bounds)]
        yield GenerationRequest(prompt=prompt, max_new_tokens=10, bound=bound)


def short_prompt(kind: str, draw: random.Random) -> list[int]:
    """Return the end of a document, with one to three compact pages."""
    (item,) = make_requests(kind, draw.choice((0.0, 0.5, 1.0)), 1, draw.randrange(2**31))
    return item.prompt[max(0, len(item.prompt) - draw.randrange(140, 280)) :]


def measure_all(
    engine: Engine, requests: Sequence[GenerationRequest], name: str
) -> Iterator[tuple[int, Measurement]]:
    """Answer requests under their own bounds and yield what is found, some at a time."""
    found: SimpleQueue[tuple[int, Measurement | Exception]] = SimpleQueue()

    def ask(index: int) -> None:
        engine.measure(requests[index], lambda result: found.put((index, result)))

    for index in range(min(_AT_ONCE, len(requests))):
        ask(index)
    for done in range(len(requests)):
        index, result = found.get()
        if isinstance(result, Exception):
            raise result
        if done + _AT_ONCE < len(requests):
            ask(done + _AT_ONCE)
        if done % 500 == 0:
            print(f"{name}: {done} of {len(requests)}", file=sys.stderr, flush=True)
        yield index, result


def answer_in_full(engine: Engine, request: GenerationRequest) -> tuple[int, ...]:
    """Return the tokens of full precision."""
    found: SimpleQueue[Measurement | Exception] = SimpleQueue()
    plain = GenerationRequest(prompt=request.prompt, max_new_tokens=request.max_new_tokens)
    engine.measure(plain, found.put)
    result = found.get()
    if isinstance(result, Exception):
        raise result
    return result.tokens


def run_calibrated(model: Any, calibrations: int, unseen: int) -> dict[str, Any]:
    """Try calibrations on requests that they haven't seen, and on those of another kind."""
    count = 59 * calibrations + unseen
    draw = random.Random(11)
    requests, kinds = [], []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        requests.append(GenerationRequest(prompt=short_prompt(kind, draw), max_new_tokens=10))
        kinds.append(kind)
    prompts = [torch.tensor([list(each.prompt)]) for each in requests[:16]]
    layers = measure_damage(model, prompts)
    with Engine(model, kv_budget=_ROOM, ladder=TIERS) as engine:
        shape = engine.shape
    ladder = make_ladder(shape, damage=layers).restrict(TIERS)
    information = mean_information(layers, shape)
    print(f"measuring {count} requests at {ladder.full} tiers", file=sys.stderr, flush=True)
    with Engine(model, kv_budget=_ROOM, ladder=ladder, prefix_bytes=0) as engine:
        rows = measure_requests(engine, requests, ladder.full, at_once=_AT_ONCE)
    order = list(range(count))
    draw.shuffle(order)
    others = [rows[index] for index in order[:unseen]]
    own = order[unseen:]
    trials = []
    for number in range(calibrations):
        some = [rows[index] for index in own[59 * number : 59 * (number + 1)]]
        calibration = calibrate(some, ladder, information)
        bounds = sorted(calibration.factor(DELTA) * predicted(each, information) for each in others)
        for epsilon in quantiles(bounds, n=4):
            trial = try_calibration(calibration, others, epsilon=epsilon, delta=DELTA)
            trials.append({"calibration": number, "epsilon": epsilon, **trial.to_json()})
    significant = {each["calibration"] for each in trials if each["interval"][0] > DELTA}
    return {
        "calibrated": {
            "delta": DELTA,
            "requests": 59,
            "unseen": unseen,
            "significantly_above": len(significant),
            "trials": trials,
        },
        "shift": run_shift(rows, kinds, ladder, information),
    }


def calibrate(rows: Sequence[RequestRow], ladder: Ladder, information: Any) -> Calibration:
    """Return a calibration of some requests."""
    keys = dict.fromkeys(KEYS, "trial")
    return make_calibration(rows, keys=keys, ladder=ladder, information=information)


def predicted(row: RequestRow, information: Any) -> float:
    """Return what is predicted of the lowest tier, nats per token."""
    from lib.progressive.estimators import predict_damage

    return predict_damage(information, row.errors[0], row.prompt_tokens)


def run_shift(
    rows: Sequence[RequestRow], kinds: Sequence[str], ladder: Ladder, information: Any
) -> dict[str, Any]:
    """Return, for each pair of kinds, the violation rate of one's calibration on the other's
    requests, and how many audits it takes to stop; the pairs with the highest rates first.
    """
    pairs = []
    for known in KINDS:
        own = [row for row, kind in zip(rows, kinds, strict=True) if kind == known][:59]
        calibration = calibrate(own, ladder, information)
        for shifted in KINDS:
            others = [row for row, kind in zip(rows, kinds, strict=True) if kind == shifted]
            bounds = [calibration.factor(DELTA) * predicted(each, information) for each in others]
            epsilon = quantiles(bounds, n=4)[2]
            trial = try_calibration(calibration, others, epsilon=epsilon, delta=DELTA)
            rate = trial.broken / trial.requests
            pairs.append(
                {
                    "calibrated_on": known,
                    "served": shifted,
                    "violations": rate,
                    "interval": list(proportion_interval(trial.broken, trial.requests)),
                    "audits_until_stop": audits_until(rate) if shifted != known else None,
                }
            )
    return {"pairs": sorted(pairs, key=lambda pair: -float(pair["violations"]))}


def audits_until(rate: float) -> int | None:
    """Return after how many audits a stream with this rate of violations is stopped; None: not in
    2000.
    """
    audit, draw = RequestAudit(DELTA, share=1.0), random.Random(5)
    for number in range(1, 2001):
        audit.record(broken=draw.random() < rate)
        if audit.stopped:
            return number
    return None


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Check quality bounds of requests against independent measurements.")
    default = "(default: %(default)s)"
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/progressive-recall"),
        metavar="DIR",
        help=f"of workload.py, trained where there is none {default}",
    )
    for name, value, what in (
        ("--verified", 10_000, "verified requests"),
        ("--calibrations", 20, "calibrations of 59 requests"),
        ("--unseen", 600, "requests that they are tried on"),
    ):
        parser.add_argument(
            name, type=whole_number(1), default=value, metavar="N", help=f"{what} {default}"
        )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="the document, in a file")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
