"""Compare pruning scores at equal sparsity: held-out perplexity, over seeds, one-shot and gradual.

Each arm is a run of the same preset with the same optimizer, steps, batches and initial weights
per seed; only the score, the scope of its threshold and the sparsity differ. One-shot arms prune
the finished dense run of the seed and train no more.

    python scripts/compare_pruning.py --json docs/results/pruning.json
"""

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lib.config import Config, load_config
from lib.errors import InputError
from lib.files import check_writable, write_text
from lib.kconfig import ROOT, read_assignments
from scripts.cli import emit_json, run_main

SPARSITIES = (0.3, 0.5, 0.7, 0.9)
_DROPPED = ("TRAIN_PRUNE", "ENABLE_HIERARCHICAL_TIERING", "TIERING_", "HINTS_", "RUN_")
_SCHEDULE = ("TRAIN_PRUNE_START_PCT", "TRAIN_PRUNE_END_PCT", "TRAIN_PRUNE_EVERY")
_QUICK = {"TRAIN_STEPS": 60, "TRAIN_WARMUP_STEPS": 6, "TRAIN_EVAL_SEQUENCES": 32}


@dataclass(frozen=True, slots=True)
class Arm:
    """What one side of the comparison prunes by."""

    score: str
    scope: str

    @property
    def symbols(self) -> dict[str, str]:
        """The lines of a configuration that select it."""
        lines = {f"TRAIN_PRUNE_{self.score.upper()}": "y"}
        return lines | ({"TRAIN_PRUNE_GLOBAL": "y"} if self.scope == "global" else {})


ARMS = {
    "ours": Arm("adam", "global"),
    "saliency": Arm("saliency", "global"),
    "magnitude_matrix": Arm("magnitude", "matrix"),
    "magnitude_global": Arm("magnitude", "global"),
    "random": Arm("random", "matrix"),
}
"""Scores with v_hat are comparable between matrices and get one threshold; magnitude has both, and
the better one speaks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run: dense where ``arm`` is None."""

    seed: int
    arm: str | None
    sparsity: float
    config: Path


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
    jobs = write_jobs(args.config, args.work_dir, args.seeds, sparsities, quick=args.quick)
    if args.jobs > 1:
        # The corpus is prepared by the first run alone, the others find it.
        first, *rest = jobs
        results = [train_job(first)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context, initializer=_one_thread) as pool:
            results += list(pool.map(train_job, rest))
    else:
        results = [train_job(job) for job in jobs]
    losses = dict(zip(jobs, results, strict=True))
    at_once = sorted({*sparsities, *(() if args.quick else SPARSITIES)})  # these cost seconds
    one_shot = [prune_once(job.config, at_once) for job in jobs if job.arm is None]
    dense = [math.exp(losses[job]) for job in jobs if job.arm is None]
    gradual: dict[str, Any] = {}
    for sparsity in sparsities:
        values = {
            arm: [
                math.exp(loss)
                for job, loss in losses.items()
                if (job.arm, job.sparsity) == (arm, sparsity)
            ]
            for arm in ARMS
        }
        gradual[str(sparsity)] = summarize({**values, "dense": dense})
    one_shot_table = {
        str(sparsity): summarize(
            {arm: [row[sparsity][arm] for row in one_shot] for arm in (*ARMS, "dense")}
        )
        for sparsity in at_once
    }
    for title, table in (("gradual", gradual), ("one-shot", one_shot_table)):
        _print_table(title, table)
    emit_json(
        {
            "preset": args.config.name,
            "seeds": [job.seed for job in jobs if job.arm is None],
            "sparsity": {key: row["perplexity"] for key, row in gradual.items()},
            "sparsity_is": "gradual, mean held-out perplexity over the seeds",
            "gradual": gradual,
            "one_shot": one_shot_table,
            "arms": {name: f"{arm.score}, {arm.scope} threshold" for name, arm in ARMS.items()},
            "method": _method(load_config(jobs[-1].config), quick=args.quick),
        },
        args.json,
    )
    return 0


def write_jobs(
    preset: Path, folder: Path, num_seeds: int, sparsities: Sequence[float], *, quick: bool
) -> list[Job]:
    """Write the .config of every run below ``folder``: the preset's lines with those of the arm."""
    lines = {name: assignment.value for name, assignment in read_assignments(preset).items()}
    schedule = {name: lines[name] for name in _SCHEDULE if name in lines}
    base = {name: value for name, value in lines.items() if not name.startswith(_DROPPED)}
    base |= {name: str(value) for name, value in _QUICK.items()} if quick else {}
    steps = base.get("TRAIN_STEPS")
    base |= {"ENABLE_HIERARCHICAL_TIERING": "n", "TRAIN_CHECKPOINT_EVERY": "0"}
    base |= {"TRAIN_EVAL_EVERY": steps} if steps else {}
    first_seed = load_config(preset).run.seed
    jobs = []
    for seed in range(first_seed, first_seed + num_seeds):
        arms = [(None, 0.0), *((arm, sparsity) for sparsity in sparsities for arm in ARMS)]
        for arm, sparsity in arms:
            name = f"seed{seed}-" + ("dense" if arm is None else f"{arm}-{sparsity}")
            symbols = base | {
                "RUN_NAME": f'"{name}"',
                "RUN_OUTPUT_DIR": f'"{folder / ("quick" if quick else "runs")}"',
                "RUN_SEED": str(seed),
            }
            if arm is not None:
                symbols |= {"TRAIN_PRUNE": "y", **schedule, **ARMS[arm].symbols}
                symbols["TRAIN_PRUNE_SPARSITY_PCT"] = str(round(sparsity * 100))
            path = folder / "configs" / f"{name}.config"
            write_text("".join(f"CONFIG_{n}={v}\n" for n, v in symbols.items()), path)
            jobs.append(Job(seed=seed, arm=arm, sparsity=sparsity, config=path))
    return jobs


def train_job(job: Job) -> float:
    """Train one run, or find it finished; returns its held-out loss in nats per token."""
    from gpt2.train import train

    result = train(load_config(job.config), job.config)
    if not result["complete"]:
        raise KeyboardInterrupt  # a signal stopped it; the next call continues
    return float(result["heldout_loss_nats"])


def prune_once(config_path: Path, sparsities: Sequence[float]) -> dict[float, dict[str, float]]:
    """Return sparsity -> arm -> held-out perplexity of a finished dense run pruned in one step."""
    import torch
    from safetensors.torch import load_file

    from gpt2.checkpoint import HELDOUT_FILE, load_optimizer
    from gpt2.model import load_model
    from gpt2.trainer import build_optimizer, token_losses
    from lib.precision.pruning import (
        PruneScope,
        PruneScore,
        prunable_parameters,
        score_weights,
        select_masks,
    )

    config = load_config(config_path)
    folder = config.run.directory / "checkpoint"
    network = load_model(folder, dropout=0.0).eval()
    optimizer = build_optimizer(network, config.train)
    load_optimizer(folder, network, optimizer)
    batches = load_file(folder / HELDOUT_FILE)["tokens"].split(config.train.batch_size)
    parameters = prunable_parameters(network)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    scores = {
        arm: score_weights(
            parameters, PruneScore(ARMS[arm].score), optimizer=optimizer, seed=config.run.seed
        )
        for arm in ARMS
    }

    @torch.no_grad()
    def perplexity() -> float:
        losses = [token_losses(network, rows, rows[:, 1:]).flatten() for rows in batches]
        return math.exp(torch.cat(losses).mean(dtype=torch.float64).item())

    dense = perplexity()
    rows: dict[float, dict[str, float]] = {}
    for sparsity in sparsities:
        rows[sparsity] = {"dense": dense}
        for arm in ARMS:
            masks = select_masks(scores[arm], sparsity, scope=PruneScope(ARMS[arm].scope))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name] * masks[name])
            rows[sparsity][arm] = perplexity()
    return rows


def summarize(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return means and deviations over seeds, and ours against the better magnitude, seed by seed.

    ``change_pct``: ours' perplexity against magnitude's; ``damage_ratio``: the same of the excess
    over dense, in nats.
    """
    names = ("magnitude_matrix", "magnitude_global")
    best = min(names, key=lambda name: mean(values[name]))
    values = {**values, "magnitude": values[best]}
    changes = [
        100 * (ours / other - 1)
        for ours, other in zip(values["ours"], values["magnitude"], strict=True)
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
        "schedule": f"cubic from step {prune.start_step} to {prune.end_step}, every {prune.every}",
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


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


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
        help=f"of gradual pruning, a run per arm and seed each {default}",
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
