"""Is Adam's second moment as good as the Fisher information it is taken for? Trains small GPT-2s
and compares, at several points of their training, what the signals say and what they decide.

    make study-signals
    python scripts/experiments/study/study_signals.py --work-dir runs/study   (the same)

Each run is trained by ``gpt2.train`` from the preset gpt2-study, and kept with its measurements:
started again, the study continues where it was. This folder says what is trained, measured
and concluded; docs/signals_study.md is the page of the full study.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from gpt2.rundir import collect_versions
from lib.checkpoint.models import quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.files import check_writable, write_json
from scripts.experiments.study.grid import (
    StudyRun,
    kept_checkpoint,
    kept_steps,
    list_runs,
    train_run,
)
from scripts.experiments.study.measure import measure_checkpoint
from scripts.experiments.study.summary import summarize

VERSIONS = ("python", "torch", "transformers", "numpy", "git_revision", "git_changes")
Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    check_writable(args.plot)
    quiet_transformers(progress=False)
    planned = list_runs(quick=args.quick)
    runs = []
    for index, run in enumerate(planned, 1):
        print(f"[{index}/{len(planned)}]", end=" ", file=sys.stderr)
        runs.append(study_run(run, args.work_dir))
    document: Fields = {
        "quick": args.quick,
        "versions": {name: value for name, value in collect_versions().items() if name in VERSIONS},
        "summary": _rounded(summarize(runs)),
        "runs": _rounded(runs),
    }
    if args.plot is not None:
        from lib.report.study_plots import plot_study

        plot_study(document, args.plot)
    _print(document)
    emit_json(document, args.json)
    return 0


def study_run(run: StudyRun, folder: Path) -> Fields:
    """Train a run and measure its checkpoints, as far as that isn't done; returns its record."""
    config = train_run(run, folder)
    checkpoints = []
    for step in kept_steps(run, config):
        checkpoint = kept_checkpoint(config, step)
        path = checkpoint / "study.json"
        if path.is_file():
            checkpoints.append(json.loads(path.read_text()))
            continue
        begin = time.perf_counter()
        point = measure_checkpoint(
            checkpoint,
            beta2=config.train.beta2,
            batch_size=config.train.batch_size,
            seed=run.seed,
        )
        point["seconds"] = round(time.perf_counter() - begin, 1)
        write_json(point, path)
        checkpoints.append(point)
    return {
        "corpus": run.corpus,
        "seed": run.seed,
        "size": run.size,
        "variant": run.variant,
        "checkpoints": checkpoints,
    }


def _rounded(value: Any) -> Any:
    """Return a nested document with its numbers to five digits: more are noise, and a third of the
    file.
    """
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _print(document: Fields) -> None:
    for criterion, row in document["summary"]["verdict"].items():
        interval = row["interval"] or [row["mean"], row["mean"]]
        print(
            f"{'met    ' if row['met'] else 'NOT met'}  {criterion}: {row['mean']:.3f} "
            f"({interval[0]:.3f} to {interval[1]:.3f}, {row['n']} runs), {row['limit']}"
        )
    print()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare Adam's second moment with Fisher information and measured KL.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=Path("runs/study"),
        metavar="DIR",
        help="trainings and measurements; what is there is not repeated (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy models: every part runs, no figure means anything"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write the picture (PNG) of the study here"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
