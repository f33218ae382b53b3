"""Compare pruning scores at equal sparsity: held-out perplexity, over seeds, one-shot and gradual.

Each arm is a run of the same preset with the same optimizer, steps, batches and initial weights
per seed; only the score, the scope of its threshold, the sparsity and the schedule differ. Until
its schedule starts an arm is the dense run of its seed, so it continues from a checkpoint of that.
One-shot arms prune the finished dense run of the seed and train no more.

    python scripts/experiments/pruning/compare_pruning.py --json docs/results/pruning.json
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.config import Config, load_config
from lib.errors import InputError
from lib.files import check_writable
from lib.kconfig import ROOT
from scripts.experiments.pruning.pruning_runs import ARMS, prune_once, train_jobs, write_jobs

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
SCHEDULES = ((60, 90), (20, 70), (80, 95))
"""Start and end in percent of the steps, the trainer's default first."""
SCHEDULES_AT = 0.5
"""The sparsity at which schedules but the first are measured."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, run what isn't finished, print the table and the result."""
    args = _parser().parse_args(argv)
    if args.seeds < 2:
        raise InputError(f"--seeds {args.seeds}: at least 2 give a standard deviation, 3 are usual")
    if not 1 <= args.jobs <= 1024:
        raise InputError(f"--jobs {args.jobs} is out of range: give 1 to 1024")
    for sparsity in args.sparsities:
        if not 0 < sparsity < 1 or abs(sparsity * 100 - round(sparsity * 100)) > 1e-9:
            raise InputError(f"--sparsities {sparsity}: give hundredths between 0 and 1")
    check_writable(args.json)
    sparsities = sorted(set(args.sparsities)) if not args.quick else [0.5]
    schedules = list(dict.fromkeys(args.schedules))[: 1 if args.quick else None]
    grid = {schedules[0]: sparsities, **{other: [SCHEDULES_AT] for other in schedules[1:]}}
    jobs = write_jobs(args.config, args.work_dir, args.seeds, grid, quick=args.quick)
    losses = dict(zip(jobs, train_jobs(jobs, num_processes=args.jobs), strict=True))
    at_once = sorted({*sparsities, *(() if args.quick else SPARSITIES)})  # these cost seconds
    one_shot = [prune_once(job.config, at_once) for job in jobs if job.arm is None]
    dense = [math.exp(losses[job]) for job in jobs if job.arm is None]
    gradual: dict[str, dict[str, Any]] = {}
    for schedule, own in grid.items():
        table = gradual[f"{schedule[0]}-{schedule[1]}"] = {}
        for sparsity in own:
            values = {
                arm: [
                    math.exp(loss)
                    for job, loss in losses.items()
                    if (job.arm, job.sparsity, job.schedule) == (arm, sparsity, schedule)
                ]
                for arm in ARMS
            }
            table[str(sparsity)] = summarize({**values, "dense": dense})
    one_shot_table = {
        str(sparsity): summarize(
            {arm: [row[sparsity][arm] for row in one_shot] for arm in (*ARMS, "dense")}
        )
        for sparsity in at_once
    }
    for name, table in gradual.items():
        _print_table(f"gradual, from {name.replace('-', ' to ')} % of the steps", table)
    _print_table("one-shot", one_shot_table)
    first = next(iter(gradual))
    emit_json(
        {
            "preset": args.config.name,
            "seeds": [job.seed for job in jobs if job.arm is None],
            "sparsity": {
                key: {**row["perplexity"], "n": row["n"]} for key, row in gradual[first].items()
            },
            "sparsity_is": f"gradual, schedule {first}, mean held-out perplexity over n seeds",
            "gradual": gradual,
            "one_shot": one_shot_table,
            "arms": {name: f"{arm.score}, {arm.scope} threshold" for name, arm in ARMS.items()},
            "method": _method(load_config(jobs[-1].config), quick=args.quick),
        },
        args.json,
    )
    return 0


def summarize(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return means and deviations over seeds, and ours against the better magnitude, seed by seed.

    ``change_pct``: ours' perplexity against magnitude's; ``lossless_pct``: what that would be if
    ours were as good as the dense network; ``damage_ratio``: ours' excess over dense against
    magnitude's, in nats.
    """
    names = ("magnitude_matrix", "magnitude_global")
    best = min(names, key=lambda name: mean(values[name]))
    values = {**values, "magnitude": values[best]}
    changes = [
        100 * (ours / other - 1)
        for ours, other in zip(values["ours"], values["magnitude"], strict=True)
    ]
    lossless = [
        100 * (dense / other - 1)
        for dense, other in zip(values["dense"], values["magnitude"], strict=True)
    ]
    damage = {
        name: mean(
            math.log(value / dense)
            for value, dense in zip(values[name], values["dense"], strict=True)
        )
        for name in values
    }
    return {
        "perplexity": {name: round(mean(row), 4) for name, row in values.items()},
        "sd": {name: round(stdev(row), 4) for name, row in values.items()},
        "per_seed": {name: [round(value, 4) for value in row] for name, row in values.items()},
        "damage_nats": {name: round(value, 5) for name, value in damage.items()},
        "magnitude_is": best,
        "change_pct": {"mean": round(mean(changes), 3), "sd": round(stdev(changes), 3)},
        "lossless_pct": round(mean(lossless), 3),
        "damage_ratio": round(damage["ours"] / damage["magnitude"], 3)
        if damage["magnitude"] > 0
        else None,
        "n": len(changes),
    }


def _method(config: Config, *, quick: bool) -> dict[str, Any]:
    model, train, prune = config.model, config.train, config.train.prune
    assert prune is not None
    return {
        "model": f"GPT-2, {model.layers} layers, {model.width} wide, {model.vocab_size} tokens",
        "steps": train.steps,
        "tokens_per_step": train.batch_size * train.accumulation * model.context,
        "heldout_tokens": train.eval_sequences * (model.context - 1),
        "schedule": f"cubic, a rise every {prune.every} steps",
        "quick": quick,
    }


def _print_table(title: str, table: Mapping[str, Any]) -> None:
    arms = ("dense", *ARMS)
    print(f"\n{title}: held-out perplexity, mean ± sd over seeds")
    print(f"{'sparsity':<9}" + "".join(f"{arm:>18}" for arm in arms) + f"{'vs magnitude':>16}")
    for sparsity, row in table.items():
        cells = (f"{row['perplexity'][arm]:.2f} ± {row['sd'][arm]:.2f}" for arm in arms)
        change = f"{row['change_pct']['mean']:+.2f} %"
        print(f"{sparsity:<9}" + "".join(f"{cell:>18}" for cell in cells) + f"{change:>16}")
    print()


def _schedule(text: str) -> tuple[int, int]:
    start, separator, end = text.partition("-")
    if not (separator and start.isdigit() and end.isdigit() and int(start) < int(end) <= 100):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give start and end in percent of the steps, such as 60-90"
        )
    return int(start), int(end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="compare_pruning.py", description=__doc__.split("\n\n")[0].strip()
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "defconfigs/gpt2-pruning",
        metavar="FILE",
        help="preset or .config that every arm is made of (default: defconfigs/gpt2-pruning)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("runs/compare-pruning"),
        metavar="DIR",
        help=f"where the runs lie; finished ones are not trained again {default}",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help=f"runs per arm {default}")
    parser.add_argument(
        "--sparsities",
        type=float,
        nargs="+",
        default=SPARSITIES,
        metavar="SHARE",
        help=f"of gradual pruning with the first schedule {default}",
    )
    parser.add_argument(
        "--schedules",
        type=_schedule,
        nargs="+",
        default=SCHEDULES,
        metavar="START-END",
        help=f"of gradual pruning, in percent of the steps; all but the first at {SCHEDULES_AT} "
        f"sparsity alone (default: {' '.join(f'{start}-{end}' for start, end in SCHEDULES)})",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help=f"runs at a time, with a thread each where there are several {default}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="60 steps and 50 %% only: whether it works, no result"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
