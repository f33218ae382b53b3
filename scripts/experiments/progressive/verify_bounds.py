"""Whether quality bounds hold: thousands of verified requests, and calibrations tried on others.

    python scripts/experiments/progressive/verify_bounds.py --verified 10000 --json runs/bounds.json

Every answer is measured by a pass of its own over the full model, apart from the passes that
verified it. *Verified*: requests of the recall tasks under four epsilons and ``exact``; an answer
above its epsilon (beyond rounding, 1e-5 nats), or of other tokens than full precision's where it is
exact, is counted, and makes the exit code 1. *Calibrated*: 20 calibrations of 59 requests each,
drawn anew, are tried on 600 others at three epsilons; exit code 1 where more than one of 20 has
a violation rate significantly above delta. *Shift*: a calibration of one kind of document is tried
on the others. *Caught*: an engine that was calibrated on text to go on with serves documents that
ask six times over; the audit has to stop it, after so many requests, and what comes then to be
answered at full.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import quantiles
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, output_file, run_main
from lib.commands.flags import whole_number
from lib.evaluation.calibrate_requests import calibrate_requests, measure_damage
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
from lib.progressive.generation import Event, GenerationRequest, Outcome
from lib.progressive.ladder import Ladder, make_ladder
from lib.progressive.measuring import Measurement
from scripts.experiments.progressive.loads import Answer
from scripts.experiments.progressive.workload import KINDS, QUERY, load_or_train, make_requests

EPSILONS = (0.001, 0.01, 0.05, 0.2)
EXACT = QualityBound(metric=Metric.EXACT)
DELTA = 0.05
TIERS = "K3V2 K4V4 K6V5"
_ROUNDING = 1e-5
"""Nats: passes of other shapes add up in another order."""
_ROOM = 2**30
_AT_ONCE = 24
_AFTER = 8
"""Requests that are looked at once the audit has stopped."""
_POLL_SECONDS = 0.001


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    torch.manual_seed(0)
    model, _ = load_or_train(args.model)
    document = {
        "verified": run_verified(model, args.verified),
        **run_calibrated(model, args.calibrations, args.unseen),
        "caught": run_caught(model),
    }
    for name, figures in document.items():
        print(name, json.dumps(figures, indent=1))
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document))
    verified, calibrated = document["verified"], document["calibrated"]
    allowed = len(calibrated["trials"]) // 20
    failed = (
        verified["above"]
        or verified["other_tokens"]
        or calibrated["significantly_above"] > allowed
        or document["caught"]["tiers_after"] != ["full"]
    )
    return int(bool(failed))


def run_verified(model: Any, count: int) -> dict[str, Any]:
    """Answer short requests under verified bounds; measure each answer apart, or compare it."""
    requests = list(short_requests(count))
    above = said_otherwise = other = tokens = 0
    nearest = 0.0
    exact: dict[int, list[tuple[int, ...]]] = {}
    with Engine(model, kv_budget=_ROOM, ladder=TIERS, prefix_bytes=0) as engine:
        for index, found in answer_all(engine, requests):
            bound = requests[index].bound
            assert bound is not None
            if isinstance(found, Measurement):
                tokens += len(found.tokens)
                above += found.mean > bound.epsilon + _ROUNDING
                nearest = max(nearest, found.mean / bound.epsilon)
                said_otherwise += abs(found.mean - found.quality.bound) > _ROUNDING
                continue
            pair = exact.setdefault(index, [])
            pair.append(found)
            if len(pair) == 2:
                tokens += len(found)
                other += pair[0] != pair[1]
    return {
        "requests": count,
        "tokens": tokens,
        "epsilons": list(EPSILONS),
        "exact": len(exact),
        "above": above,
        "other_tokens": other,
        "said_otherwise": said_otherwise,
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


def answer_all(
    engine: Engine, requests: Sequence[GenerationRequest]
) -> Iterator[tuple[int, Measurement | tuple[int, ...]]]:
    """Answer requests, some at a time, and yield what each answer was measured to be; of an exact
    one its tokens, and those of full precision.
    """
    found: SimpleQueue[tuple[int, Any]] = SimpleQueue()

    def ask(index: int) -> int:
        request = requests[index]
        if request.bound != EXACT:
            engine.measure(request, partial(_put, found, index))
            return 1
        for bound in (EXACT, None):
            engine.submit(replace(request, bound=bound), Tokens(partial(_put, found, index)))
        return 2

    asked = going = done = 0
    while asked < len(requests) or going:
        while asked < len(requests) and going < _AT_ONCE:
            going += ask(asked)
            asked += 1
        index, result = found.get()
        if isinstance(result, Exception):
            raise result
        going -= 1
        done += 1
        if done % 500 == 0:
            print(f"verified: {done} answers", file=sys.stderr, flush=True)
        yield index, result


def _put(found: SimpleQueue[tuple[int, Any]], index: int, result: Any) -> None:
    found.put((index, result))


class Tokens:
    """Collects an answer's tokens, and hands them on when it has ended."""

    def __init__(self, hand_on: Callable[[Any], None]) -> None:
        self._tokens: list[int] = []
        self._hand_on = hand_on

    def __call__(self, event: Event) -> None:
        if isinstance(event, tuple):
            self._tokens += [token.id for token in event]
        else:
            self._hand_on(event if isinstance(event, Exception) else tuple(self._tokens))


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


def run_caught(model: Any, *, most: int = 600) -> dict[str, Any]:
    """Serve a workload that the calibration isn't of, every answer audited, until that stops it;
    say after how many requests, and at which tiers those after it were answered.

    Epsilon is the 0.9 quantile of the lowest tier's bounds: so most are released there.
    """
    draw = random.Random(13)
    known = [item.prompt[:240] for item in make_requests("continue", 0.5, 59, 1)]
    calibration = calibrate_requests(
        model, [_ask_ten(prompt) for prompt in known], kv_budget=_ROOM, tiers=TIERS
    )
    asking = [_ask_ten(_ask_again(short_prompt("queries", draw), 6)) for _ in range(most)]
    with Engine(model, kv_budget=_ROOM, ladder=calibration.ladder, prefix_bytes=0) as engine:
        rows = measure_requests(engine, asking[:80], 1, at_once=_AT_ONCE)
    factor = calibration.factor(DELTA)
    bounds = [factor * predicted(row, calibration.information) for row in rows]
    bound = QualityBound(epsilon=quantiles(bounds, n=10)[-1], delta=DELTA)
    answered, after = 0, list[str]()
    with Engine(
        model, kv_budget=_ROOM, calibration=calibration, audited_share=1.0, prefix_bytes=0
    ) as engine:
        for request in asking:
            stopped = bool(engine.stats().stopped_bounds)
            outcome = _answer(engine, replace(request, bound=bound))
            if not stopped:
                answered += 1
                continue
            after.append(outcome.quality.tier)
            if len(after) == _AFTER:
                break
        stats = engine.stats()
    return {
        "calibrated_on": "continue",
        "served": "queries, asked six times more",
        "epsilon": bound.epsilon,
        "requests": answered if after else None,
        "broken": stats.broken_bounds,
        "tiers_after": sorted(set(after)),
    }


def _ask_ten(prompt: Sequence[int]) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_new_tokens=10)


def _ask_again(prompt: list[int], times: int) -> list[int]:
    """Return a document that asks what it asks so many times more."""
    return prompt + prompt[prompt.index(QUERY) :] * times


def _answer(engine: Engine, request: GenerationRequest) -> Outcome:
    """Answer a request, and wait until that is measured, too."""
    answer = Answer(0.0)
    before = engine.stats()
    engine.submit(request, answer)
    outcome = answer.result()
    while not (now := engine.stats()).stopped_bounds and (
        now.audits + now.failed_audits == before.audits + before.failed_audits
    ):
        time.sleep(_POLL_SECONDS)
    return outcome


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
