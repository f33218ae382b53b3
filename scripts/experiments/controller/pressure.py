"""Halve the budget and restore it, every few seconds, under a model that generates all the time.

    python scripts/experiments/controller/pressure.py --model ./my-model --seconds 120

An operator's thread asks; the model's thread goes on. What is checked: outputs equal those of a run
under a fixed plan, memory is within each budget soon after it was asked for, nothing grows before
the dwell is over, no block changes more often than its bucket allows, no floor is crossed, and the
log gives the same decisions in another process with another hash seed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import Parser, emit, run_main
from lib.commands.flags import whole_number
from lib.policy.control import Settings
from lib.tiering import Runtime, attach
from lib.tiering.control.budget_control import BudgetControl
from lib.tiering.control.changes import Change
from lib.units import format_bytes
from lib.vocabulary import is_below

_ROOT = Path(__file__).resolve().parents[3]
_PROMPTS = 4
_PROMPT_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class _Generation:
    """What the model's thread has done."""

    wanted: list[torch.Tensor]
    tokens: int = 0
    wrong: int = 0
    error: BaseException | None = None
    stop: threading.Event = field(default_factory=threading.Event)


def run_pressure(
    model: nn.Module,
    *,
    hints: Path | None = None,
    precision: str | None = None,
    seconds: float = 120.0,
    period_seconds: float = 4.0,
    new_tokens: int = 24,
    settings: Settings | None = None,
    log: Path | None = None,
    spill_dir: Path | None = None,
) -> dict[str, Any]:
    """Run the scenario; returns its figures. ``recover_ms``: from a smaller budget's being asked
    for until memory is within it, whichever module was running.
    """
    settings = settings or Settings(dwell_us=round(period_seconds * 1e6 / 4), refill_us=1_000_000)
    prompts = _make_prompts(model)
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "control.jsonl"
        with attach(
            model,
            hints,
            budget={"HBM": None, "SSD": None},
            precision=precision,
            spill_dir=spill_dir or Path(folder),
        ) as runtime:
            generation = _Generation(
                wanted=[_generate(model, prompt, new_tokens) for prompt in prompts]
            )
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            control = runtime.control(settings=settings, log=log)
            thread = threading.Thread(
                target=_keep_generating, args=(model, prompts, new_tokens, generation)
            )
            began = time.perf_counter()
            thread.start()
            try:
                checks = _press(runtime, control, began + seconds, period_seconds, generation)
            finally:
                generation.stop.set()
                thread.join()
            took = time.perf_counter() - began
            changes = list(control.changes)
            same_buffers = all(
                torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers()
            )
            busy = control.seconds
        replayed = _replay(log)
    if generation.error is not None:
        raise generation.error
    recover = [change.seconds * 1e3 for change in changes if change.demoted]
    waits = [(change.began_at - change.asked_at) * 1e3 for change in changes if change.demoted]
    counts = Counter(name for change in changes for name in change.demoted + change.promoted)
    return {
        "seconds": took,
        "changes": len(changes),
        "transitions": sum(counts.values()),
        "transitions_per_block_max": max(counts.values(), default=0),
        "transitions_per_block_allowed": settings.tokens + int(took * 1e6) // settings.refill_us,
        "recover_ms_max": max(recover, default=None),
        "recover_ms": recover,
        "recover_ms_median": statistics.median(recover) if recover else None,
        "module_in_flight_ms_max": max(waits, default=None),
        "growth_step_ms_max": max(
            ((c.ended_at - c.began_at) * 1e3 for c in changes if c.promoted), default=None
        ),
        "outputs_equal": generation.wrong == 0 and same_buffers,
        "tokens": generation.tokens,
        "tokens_per_s": generation.tokens / took,
        "dwell_violations": _early_growth(changes, settings),
        "controller_share": busy / took,
        "replay_identical": replayed,
        **checks,
    }


def _make_prompts(model: nn.Module) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    shape = (_PROMPTS, 1, _PROMPT_TOKENS)
    device = next(model.parameters()).device
    return list(torch.randint(vocabulary, shape, generator=generator).to(device))


def _generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    text: torch.Tensor = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return text


def _keep_generating(
    model: nn.Module, prompts: Sequence[torch.Tensor], new_tokens: int, state: _Generation
) -> None:
    try:
        while not state.stop.is_set():
            for prompt, wanted in zip(prompts, state.wanted, strict=True):
                state.wrong += not torch.equal(_generate(model, prompt, new_tokens), wanted)
                state.tokens += new_tokens
                if state.stop.is_set():
                    return
    except BaseException as error:
        state.error = error


def _press(
    runtime: Runtime,
    control: BudgetControl,
    until: float,
    period_seconds: float,
    generation: _Generation,
) -> dict[str, Any]:
    """Ask for half of the memory and for all of it in turns; returns what each was checked for."""
    largest = runtime.plan.fast_bytes
    half = max(largest // 2, control.controller.floor_bytes)
    over = below_floor = full = 0
    least = largest
    floors = runtime.veto.ledger.floors
    while time.perf_counter() < until and generation.error is None:
        control.request(half)
        over += runtime.stats().resident_bytes > half
        least = min(least, runtime.stats().resident_bytes)
        time.sleep(period_seconds / 2)
        over += runtime.stats().resident_bytes > half
        control.request(None)
        time.sleep(period_seconds / 2)
        full += runtime.plan.fast_bytes == largest
        below_floor += sum(
            is_below(place.precision, floors[name])
            for name, place in runtime.plan.placements.items()
            if name in floors
        )
    return {
        "full_bytes": largest,
        "half_bytes": half,
        "least_resident_bytes": least,
        "over_budget": over,
        "times_full_again": full,
        "floors_crossed": below_floor,
    }


def _early_growth(changes: Sequence[Change], settings: Settings) -> int:
    """Count what came before the dwell since something left was over."""
    early, left_at = 0, None
    for change in changes:
        if change.promoted and left_at is not None:
            early += (change.ended_at - left_at) * 1e6 < settings.dwell_us
        if change.demoted:
            left_at = change.ended_at
    return early


def _replay(log: Path) -> bool:
    """Say whether another process, with another hash seed, decides the same."""
    done = subprocess.run(
        [sys.executable, "-m", "lib.commands", "replay", str(log), "--json", "-"],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    return done.returncode == 0 and bool(json.loads(done.stdout)["identical"])


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    quiet_transformers(progress=False)
    log = args.log.resolve() if args.log is not None else None
    found = run_pressure(
        load_model(args.model).eval(),
        hints=args.tier_hints,
        precision=args.precision,
        seconds=args.seconds,
        period_seconds=args.period,
        new_tokens=args.new_tokens,
        log=log,
        spill_dir=args.spill_dir,
    )
    lines = [
        f"{found['changes']} changes in {found['seconds']:.0f} s, {found['tokens']} tokens, "
        f"{format_bytes(found['half_bytes'])} to {format_bytes(found['full_bytes'])}",
        f"memory given back within {found['recover_ms_max']:.0f} ms "
        f"(median {found['recover_ms_median']:.0f}), of which the module that ran took "
        f"{found['module_in_flight_ms_max']:.0f}",
        f"at most {found['transitions_per_block_max']} transitions of a block, allowed "
        f"{found['transitions_per_block_allowed']}; growth before its dwell: "
        f"{found['dwell_violations']}; floors crossed: {found['floors_crossed']}; above the "
        f"budget: {found['over_budget']}",
        f"outputs equal: {found['outputs_equal']}; replay identical: {found['replay_identical']}; "
        f"controller: {found['controller_share']:.2%} of the time",
    ]
    emit("\n".join(lines), found, args.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint")
    parser.add_argument("--tier-hints", type=Path, metavar="FILE", help="its hints")
    parser.add_argument("--precision", metavar="NAME", help="hold weights in it (default: as is)")
    parser.add_argument("--seconds", type=float, default=120.0, help="(default: %(default)s)")
    parser.add_argument("--period", type=float, default=4.0, help="seconds of a halving and back")
    parser.add_argument("--new-tokens", type=whole_number(1), default=24, help="of a generation")
    parser.add_argument("--threads", type=whole_number(1), default=2, help="of torch")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the controller's log")
    parser.add_argument("--spill-dir", type=Path, metavar="FOLDER", help="of what is away")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
