"""Measure what placing and compressing a model costs in quality, on text of your own.

    tierhints evaluate --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json --precision int4     # or --epsilon 0.02

The model is measured as it is, then with its weights placed and stored as asked, kernels included:
perplexity of both, KL(full || ours) in nats per token, share of equal most likely tokens. --tasks
runs tasks of lm-evaluation-harness on both.
"""

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.models import load_model, quiet_transformers
from ..errors import InputError
from ..evaluation.evaluate import LEAST_SEQUENCES, evaluate
from ..hints import load_hints
from ..signals.summary import dtype_names
from ..text.held_out import load_tokenizer
from ..tiering.planning.budget import read_budget
from .cli import Parser, add_json_flag, emit
from .flags import (
    add_budget_flag,
    add_device_flag,
    add_hints_flag,
    add_model_flag,
    add_precision_flags,
    check_epsilon,
    parse_device,
    planned_precision,
    whole_number,
)
from .text_flags import add_text_flags, read_held_out

HARNESS = "lm_eval"
Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and emit; returns the exit code."""
    args = _parser().parse_args(argv)
    _check(args)
    device = parse_device(args.device)
    quiet_transformers(progress=sys.stderr.isatty())
    hints = None if args.tier_hints is None else load_hints(args.tier_hints)
    model: Any = load_model(args.model)
    text = read_held_out(args, model)
    if len(text.tokens) < LEAST_SEQUENCES:
        raise InputError(
            f"{text.source} has {len(text.tokens)} sequences of {text.tokens.shape[1]} tokens, and "
            f"an interval needs {LEAST_SEQUENCES}: give more text with --data, or a shorter "
            "--sequence-length"
        )
    model.to(device)
    found = evaluate(
        model,
        text.tokens,
        hints,
        budget=None if args.budget is None else read_budget(args.budget),
        precision=planned_precision(args.precision),
        epsilon=args.epsilon,
        device=device,
        also=(lambda: run_tasks(model, args)) if args.tasks else None,
    )
    full_tasks, placed_tasks = found.besides
    document: Fields = {
        "model": args.model,
        "tier_hints": None if args.tier_hints is None else str(args.tier_hints),
        "budget": args.budget,
        "precision": args.precision,
        "dtype": dtype_names(model),
        "device": str(device),
        "epsilon": args.epsilon,
        "text": {"source": text.source, "sequence_length": text.tokens.shape[1]},
        "bytes_per_tier": found.bytes_per_tier,
        "peak_weight_bytes": found.peak_weight_bytes,
        "precisions": found.precisions,
        "predicted_nats": found.predicted_nats,
        "bound_nats": found.bound_nats,
        **found.quality.to_json(),
        "tasks": {"full": full_tasks, "ours": placed_tasks} if args.tasks else None,
    }
    emit(_table(document), document, args.json)
    return 0


def run_tasks(model: Any, args: argparse.Namespace) -> Fields:
    """Return task -> metric -> value, by lm-evaluation-harness on the model as it is now."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    include = None if args.task_folder is None else str(args.task_folder)
    manager = TaskManager(include_path=include)
    if unknown := sorted(set(args.tasks) - set(manager.all_tasks)):
        raise InputError(f"--tasks {unknown[0]!r} is unknown: lm_eval --tasks list shows them")
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=load_tokenizer(args.model), batch_size=1),
        tasks=args.tasks,
        limit=args.limit,
        task_manager=manager,
        random_seed=args.seed,
        numpy_random_seed=args.seed % 2**32,  # the largest that it takes
        torch_random_seed=args.seed,
        fewshot_random_seed=args.seed,
        verbosity="ERROR",
        log_samples=False,
    )
    return {
        task: {key: value for key, value in scores.items() if isinstance(value, int | float)}
        for task, scores in result["results"].items()
    }


def _table(document: Mapping[str, Any]) -> str:
    lines: list[str] = []
    interval = document["kl_interval"]
    spread = "" if interval is None else f" ({interval[0]:.3g} to {interval[1]:.3g}, 95 %)"
    ratio = document["perplexity"] / document["reference_perplexity"] - 1
    lines.append(f"text            {document['text']['source']}")
    lines.append(f"                {document['sequences']} sequences, {document['tokens']} tokens")
    lines.append(f"perplexity      {document['reference_perplexity']:.4f} full")
    lines.append(f"                {document['perplexity']:.4f} as placed ({ratio:+.2%})")
    lines.append(f"KL(full || it)  {document['kl_nats']:.4g} nats per token{spread}")
    if document["epsilon"] is not None:
        lines.append(
            f"                {document['predicted_nats']:.4g} predicted, at most "
            f"{document['bound_nats']:.4g} by its bound; epsilon {document['epsilon']}"
        )
    lines.append(f"same top token  {document['top1_agreement']:.2%}")
    for task, scores in ((document["tasks"] or {}).get("ours") or {}).items():
        for metric, value in scores.items():
            full = document["tasks"]["full"][task][metric]
            lines.append(f"{task} {metric}: {full:.4g} full, {value:.4g} as placed")
    return "\n".join(lines)


def _check(args: argparse.Namespace) -> None:
    if args.samples < LEAST_SEQUENCES:
        raise InputError(f"--samples {args.samples} must be at least {LEAST_SEQUENCES}")
    check_epsilon(args)
    if args.tier_hints is None and args.budget is None:
        raise InputError("nothing says where weights go: give --tier-hints, or --budget HBM=,SSD=")
    if args.tasks and importlib.util.find_spec(HARNESS) is None:
        raise InputError(
            "--tasks needs lm-evaluation-harness, which isn't installed: pip install lm_eval"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("Measure perplexity, KL and top-1 agreement of a placed, compressed model.")
    model = parser.add_argument_group("model")
    add_model_flag(model)
    add_hints_flag(model)
    add_budget_flag(model, otherwise="each block goes where the hints say")
    add_precision_flags(model)
    add_device_flag(model)
    add_text_flags(parser, samples=64, use="")
    tasks = parser.add_argument_group("lm-evaluation-harness")
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to run, full and placed")
    tasks.add_argument(
        "--task-folder", type=Path, metavar="DIR", help="a folder with more task definitions (YAML)"
    )
    tasks.add_argument(
        "--limit", type=whole_number(1), metavar="N", help="documents of each task, at most"
    )
    add_json_flag(parser)
    return parser
