"""The controller's benchmark: dense decoding, a mixture's, mixes of prompts and decoding, pressure.

    make bench-controller
    make bench-controller BENCH_CONTROLLER_ARGS="--quick --json runs/controller.json"

The mixture is a trained one, since an untrained router makes all policies alike (docs/moe.md):

    make KCONFIG_CONFIG=runs/moe.config moe-quickstart_defconfig
    make KCONFIG_CONFIG=runs/moe.config

The dense model is made here with random weights, which decide nothing about bytes. Tables first;
the last line of stdout is one JSON document, whose fields docs/experts.md names.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import Parser, output_file, run_main
from lib.commands.flags import whole_number
from lib.errors import InputError
from lib.files import check_writable, write_json
from lib.machine import cpu_name
from lib.units import format_bytes
from scripts.experiments.controller.decoding import Given, read_given
from scripts.experiments.controller.dense import run_dense
from scripts.experiments.controller.moe import RATIOS, SHARES, run_moe, run_share, summary
from scripts.experiments.controller.pressure import run_pressure

SCENARIOS = ("dense", "moe", "mix", "pressure")
_MODEL = Path("runs/moe-quickstart/checkpoint")
_QUICK_SECONDS = 6.0
"""Of pressure."""
_MIX_SHARE = 0.2
_PROMPTS = (0.125, 0.75)
"""Shares of a row that are its prompt: mostly decoding, mostly prefill."""


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    if unknown := set(args.scenarios).difference(SCENARIOS):
        raise InputError(f"scenario {min(unknown)!r} is unknown: choose from {SCENARIOS}")
    if {"moe", "mix"}.intersection(args.scenarios) and not Path(args.model).is_dir():
        raise InputError(
            f"{args.model} is not there: train it by make KCONFIG_CONFIG=runs/moe.config "
            "moe-quickstart_defconfig, then make KCONFIG_CONFIG=runs/moe.config (minutes); or give "
            "--model, or --scenarios dense,pressure"
        )
    torch.set_num_threads(args.threads)
    quiet_transformers(progress=False)
    document = {
        "machine": cpu_name(),
        "threads": args.threads,
        "clock": "thread" if args.cpu_time else "wall",
        "quick": args.quick,
        "scenarios": {name: _RUNS[name](args) for name in args.scenarios},
    }
    if args.json is not None:
        write_json(document, args.json)
    print(json.dumps(document, allow_nan=False), flush=True)
    return 0


def _run_dense(args: argparse.Namespace) -> dict[str, Any]:
    found = run_dense(_dense_model(args), share=0.6, tokens=4 if args.quick else 32)
    print(f"\ndense decoding, 60 % of the weights' memory\n{'':8} {'bytes/token':>12} tokens/s")
    for name in ("ours", "static", "lru", "lfu", "belady"):
        each = found[name]
        rate = f"{each['tokens_per_s']:.1f}" if "tokens_per_s" in each else "-"
        print(f"{name:8} {format_bytes(round(each['bytes'])):>12} {rate:>8}")
        # Only what runs has times.
        found[name] = {"tokens_per_s": None, "stall_s": None, **each}
    return found


def _run_moe(args: argparse.Namespace) -> dict[str, Any]:
    model, hints = _mixture(args)
    found = run_moe(
        model,
        _given(args, model, prompt=16),
        hints=hints,
        shares=(0.1, 0.2) if args.quick else SHARES,
        ratios=(1.0,) if args.quick else RATIOS,
        rounds=args.rounds,
        spill_dir=args.spill_dir,
    )
    print(summary(found))
    return found


def _run_mix(args: argparse.Namespace) -> dict[str, Any]:
    model, hints = _mixture(args)
    found: dict[str, Any] = {"resident": _MIX_SHARE, "x_over_c": 1.0, "prompts": {}}
    length = int(model.config.max_position_embeddings)
    for share in _PROMPTS:
        prompt = max(round(share * length), 1)
        print(f"\nprompts of {prompt} tokens, {length - prompt} decoded after each")
        found["prompts"][str(prompt)] = run_share(
            model,
            _given(args, model, prompt=prompt),
            hints=hints,
            share=_MIX_SHARE,
            rounds=args.rounds,
        )
    return found


def _run_pressure(args: argparse.Namespace) -> dict[str, Any]:
    found = run_pressure(
        _dense_model(args),
        seconds=_QUICK_SECONDS if args.quick else 120.0,
        period_seconds=2.0 if args.quick else 4.0,
    )
    print(
        f"\npressure: {found['changes']} changes in {found['seconds']:.0f} s, memory given back "
        f"within {found['recover_ms_max']:.0f} ms, at most {found['transitions_per_block_max']} "
        f"transitions of a block, outputs equal: {found['outputs_equal']}"
    )
    return found


_RUNS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "dense": _run_dense,
    "moe": _run_moe,
    "mix": _run_mix,
    "pressure": _run_pressure,
}


def _mixture(args: argparse.Namespace) -> tuple[Any, Path | None]:
    """Return the mixture, and the hints beside its folder, if there are."""
    hints = Path(args.model).parent / "tier_hints.json"
    return load_model(args.model).eval(), hints if hints.exists() else None


def _given(args: argparse.Namespace, model: Any, *, prompt: int) -> Given:
    return read_given(
        model,
        str(args.model),
        sequences=1 if args.quick else args.sequences,
        prompt_tokens=prompt,
        cpu_time=args.cpu_time,
    )


def _dense_model(args: argparse.Namespace) -> Any:
    if args.dense_model is not None:
        return load_model(args.dense_model).eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = 64 if args.quick else 384
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=1024,
            max_position_embeddings=256,
        )
    ).eval()


def _names(text: str) -> list[str]:
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default=str(_MODEL), metavar="FOLDER", help="a trained mixture (%(default)s)"
    )
    parser.add_argument("--dense-model", metavar="FOLDER", help="a dense one (default: made here)")
    parser.add_argument(
        "--scenarios", type=_names, default=list(SCENARIOS), metavar="NAME,...", help="some of them"
    )
    parser.add_argument("--quick", action="store_true", help="a minute: too short to judge by")
    parser.add_argument("--sequences", type=whole_number(1), default=4, help="of held-out text")
    parser.add_argument(
        "--rounds", type=whole_number(1), default=1, help="of a mixture, from empty caches"
    )
    parser.add_argument("--threads", type=whole_number(1), default=1, help="of torch")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the thread's own time, on a shared machine"
    )
    parser.add_argument("--spill-dir", type=Path, metavar="FOLDER", help="a mixture's on this disk")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the figures")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
