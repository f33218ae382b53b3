"""What `make` does: train, benchmark and report, as the configuration says.

Each stage is a command of its own, printed before it runs, so that a user can run it alone. Ctrl-C
and SIGTERM are left to the stage: training saves and ends, and the pipeline stops after it.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout

from lib.commands.cli import run_main
from lib.config import Config, Mode, load_config
from lib.errors import InputError

STAGES = ("train", "bench", "report")
CONTENTS = {
    "checkpoint": "the model: --model of the benchmark, or from_pretrained",
    "tier_hints.json": "importance and tier of each block",
    "benchmark_emulated.json": "what emulated tiers cost",
    "benchmark_real.json": "what real offload costs and saves",
    "fisher_diag.safetensors": "the Fisher information of every parameter",
    "frontier.json": "fast memory, tokens per second and KL of the model held in many ways",
    "frontier.png": "the picture of it",
    "allocations.json": "allocations of precision at equal bytes",
    "kv_cache.json": "caches whose layers have different precisions",
    "layers.json": "the layers, least sensitive first",
    "metrics.jsonl": "loss, learning rate and gradient norm of each step",
    "loss.png": "the loss curve",
    "report.html": "everything on one page: open it in a browser",
    ".config": "the configuration of this run",
}


class StageFailed(Exception):
    """A stage ended early, and has said why itself; carries the exit code to end with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if unknown := set(args.stages).difference(STAGES):
        raise InputError(f"stage {min(unknown)!r} is unknown: choose from {', '.join(STAGES)}")
    config = load_config(args.config)
    stages = args.stages or configured_stages(config)
    if "bench" in stages:
        check_spill_folder(config)
        check_tiering(config)
    documents: list[Any] = []
    try:
        for stage in stages:
            if stage == "train":
                train(config, args.config)
            elif stage == "bench":
                documents = benchmark(config)
            else:
                text, _ = run_command(["lib.commands", "report", str(config.run.directory)])
                print(text)
    except StageFailed as error:
        return error.code
    print_contents(config)
    if documents:
        print(f"\n{closing_table(config, documents)}")
    return 0


def closing_table(config: Config, documents: list[Any]) -> str:
    """Return what the run is about: the frontier if it was measured, else the benchmarks."""
    if config.bench.frontier:
        from lib.report.frontier import frontier_table

        path = config.run.directory / "frontier.json"
        picture = config.run.directory / "frontier.png"
        table = frontier_table(json.loads(path.read_text(encoding="utf-8")))
        return f"{table}\nthe same as a picture: {picture}" if picture.exists() else table
    from lib.report import benchmark_table

    return benchmark_table(documents)


def configured_stages(config: Config) -> list[str]:
    wanted = {
        "train": True,
        "bench": config.tiering.inference_benchmark,
        "report": config.report.html,
    }
    return [stage for stage in STAGES if wanted[stage]]


def check_spill_folder(config: Config) -> None:
    """Refuse a folder that the benchmark would refuse only after training."""
    folder = config.tiering.spill_dir
    if not folder:
        return
    from lib.tiering.stores import MEMORY_FILESYSTEMS, filesystem_type

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=folder).cleanup()
    except OSError as error:
        raise InputError(
            f"TIERING_SPILL_DIR {folder!r} can't be written ({error.strerror}): give a folder on a "
            "disk"
        ) from error
    kind = filesystem_type(Path(folder))
    if "real" in benchmark_modes(config) and kind in MEMORY_FILESYSTEMS:
        raise InputError(
            f"TIERING_SPILL_DIR {folder!r} is on {kind}, which is memory: give a folder on a disk"
        )


def check_tiering(config: Config) -> None:
    """Refuse a budget or a quality bound that the benchmark would refuse only after training."""
    from lib.precision.floors import parse_epsilon

    try:
        if config.bench.budget:
            check_budget(config)
        if config.bench.epsilon:
            parse_epsilon(config.bench.epsilon)
    except InputError as error:
        raise InputError(f"BENCH_BUDGET or BENCH_EPSILON: {error}") from error


def check_budget(config: Config) -> None:
    """Refuse a budget that is too small for the model whatever floors its hints will have. One that
    isn't configured here, but pretrained, is planned for when it is benchmarked.
    """
    from lib.tiering.planning.budget import read_budget

    budget, bench = read_budget(config.bench.budget), config.bench
    if config.model.pretrained or (bench.epsilon and bench.precision == "native"):
        return
    import torch

    from gpt2.model import make_network
    from lib.commands.flags import parse_device
    from lib.progressive.division import divide
    from lib.tiering import plan

    precision = None if bench.precision == "native" else bench.precision
    model = make_network(config.model).to(getattr(torch, bench.dtype))
    device = parse_device(config.run.device)
    for mode in benchmark_modes(config):
        plan(model, mode=mode, budget=budget, precision=precision, device=device)
    if bench.exact:
        divide(model, None, budget=budget, device=device)


def benchmark_modes(config: Config) -> list[Mode]:
    """Return the mode that is set, after the other one if both are wanted."""
    mode = config.tiering.mode
    if not config.bench.both_modes:
        return [mode]
    return ["real" if mode == "emulated" else "emulated", mode]


def train(config: Config, path: Path) -> None:
    text, result = run_command(["gpt2.train", "--config", str(path)])
    print(text)
    if not result["complete"]:
        print(
            f"stopped: training was interrupted at step {result['step']} of {config.train.steps}; "
            f"its checkpoint is saved, and the same make command continues it",
            file=sys.stderr,
        )
        raise StageFailed(1)


def benchmark(config: Config) -> list[Any]:
    """Benchmark each mode that is wanted; return the documents."""
    if not config.tiering.generate_json:
        raise InputError(
            "there are no hints to benchmark: ENABLE_HIERARCHICAL_TIERING or TIERING_GENERATE_JSON "
            "is off (make menuconfig)"
        )
    checkpoint = config.run.directory / "checkpoint"
    for path in (checkpoint, config.hints_path):
        if not path.exists():
            raise InputError(f"nothing to benchmark, there is no {path}: run make train")
    if config.bench.epsilon:
        calibrate(config, checkpoint)
    documents = [benchmark_mode(config, mode, checkpoint) for mode in benchmark_modes(config)]
    compare_uses(config, checkpoint)
    return documents


def compare_uses(config: Config, checkpoint: Path) -> None:
    """Put the signals to use in the other ways that are wanted, and print what each is worth."""
    folder, model = config.run.directory, ["--model", str(checkpoint)]
    commands = []
    if config.bench.frontier:
        calibrate(config, checkpoint)
        flags = ["--tier-hints", str(config.hints_path), "--device", config.run.device]
        flags += ["--json", str(folder / "frontier.json")]
        commands.append(["lib.commands", "frontier", *model, *flags])
    if config.bench.allocations:
        calibrate(config, checkpoint)
        flags = ["--tier-hints", str(config.hints_path), "--device", config.run.device]
        flags += ["--json", str(folder / "allocations.json")]
        commands.append(["scripts.experiments.allocations.compare_allocations", *model, *flags])
    if config.bench.kv_cache:
        flags = ["--json", str(folder / "kv_cache.json")]
        commands.append(["scripts.experiments.kv_cache.compare_kv_cache", *model, *flags])
        flags = ["--output", str(folder / "layers.json"), "--device", config.run.device]
        commands.append(["lib.commands", "rank-layers", *model, *flags])
    for command in commands:
        text, _ = run_command(command)
        if "frontier" not in command:  # it closes the run
            print(text)


def calibrate(config: Config, checkpoint: Path) -> None:
    """Predict and measure what precision costs, unless the hints say it already, and all of it:
    older ones may lack what an epsilon needs.
    """
    from lib.hints import load_hints
    from lib.precision.floors import read_trust

    try:
        read_trust(load_hints(config.hints_path).quality)
        return
    except InputError:
        pass
    command = ["lib.commands", "calibrate", "--model", str(checkpoint)]
    command += ["--tier-hints", str(config.hints_path)]
    text, _ = run_command(command)
    print(text)


def benchmark_mode(config: Config, mode: Mode, checkpoint: Path) -> Any:
    command = ["scripts.benchmark_tiered_inference", "--model", str(checkpoint)]
    command += ["--tier-hints", str(config.hints_path), "--mode", mode, "--baseline"]
    command += ["--batch-size", str(config.bench.batch_size)]
    command += ["--seq-length", str(config.bench.seq_length)]
    command += ["--num-iterations", str(config.bench.iterations)]
    command += ["--warmup", str(config.bench.warmup)]
    command += ["--device", config.run.device, "--dtype", config.bench.dtype]
    if config.bench.budget:
        command += ["--budget", config.bench.budget]
    if config.bench.precision != "native":
        command += ["--precision", config.bench.precision]
    if config.bench.epsilon:
        command += ["--epsilon", config.bench.epsilon]
    if config.bench.exact and mode == "real":
        command += ["--exact"]
    if not config.tiering.look_ahead:
        command += ["--no-look-ahead"]
    if config.tiering.dwell_ms is not None:
        command += ["--dwell-ms", str(config.tiering.dwell_ms)]
    if mode == "emulated":
        spec = config.run.directory / "tier_spec.json"
        write_spec(config, spec)
        command += ["--spec", str(spec)]
    command += ["--json", str(config.run.directory / f"benchmark_{mode}.json")]
    text, document = run_command(command, temporary=config.tiering.spill_dir)
    print(text)
    return document


def write_spec(config: Config, path: Path) -> None:
    from lib.tiering import EmulationSpec, TierSpec, save_specs
    from lib.tiering.transfer.specs import Clock
    from lib.vocabulary import Tier

    specs = {
        Tier(numbers.tier): TierSpec(numbers.label, numbers.setup_us, numbers.bandwidth_gb_s)
        for numbers in config.tiering.specs
    }
    save_specs(EmulationSpec(specs=specs, clock=Clock(config.tiering.clock)), path)


def run_command(command: Sequence[str], *, temporary: str = "") -> tuple[str, Any]:
    """Run a module of this project; return its stdout without the last line, and that as JSON.

    ``temporary`` is the folder for its temporary files, the system's if empty. A failure raises
    StageFailed; the command itself has printed the reason.
    """
    shown = (
        ["tierhints", *command[1:]] if command[0] == "lib.commands" else ["python", "-m", *command]
    )
    print(f"\n$ {shlex.join(shown)}", file=sys.stderr, flush=True)
    environment = dict(os.environ)
    if temporary:
        Path(temporary).mkdir(parents=True, exist_ok=True)
        environment["TMPDIR"] = temporary
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with signals_left_to(process):
        output, _ = process.communicate()
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        print(f"failed: {command[0]} was killed by {name}", file=sys.stderr)
        raise StageFailed(1)
    if process.returncode > 0:
        raise StageFailed(process.returncode)
    text, _, document = output.rstrip("\n").rpartition("\n")
    return text.strip("\n"), json.loads(document)


@contextmanager
def signals_left_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """Let the running stage decide what SIGINT and SIGTERM mean; both are handled as before after.

    A terminal sends SIGINT to both processes, SIGTERM reaches this one only and is passed on.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    # Handlers, not SIG_IGN, which the child would inherit.
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, ignore),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def print_contents(config: Config) -> None:
    directory = config.run.directory
    print(f"\nIn {directory}:")
    contents = CONTENTS | {config.tiering.json_output: CONTENTS["tier_hints.json"]}
    for name, description in contents.items():
        if (directory / name).exists():
            print(f"  {name:24} {description}")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train, benchmark and report.")
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="STAGE",
        help=f"{', '.join(STAGES)} (default: those that the configuration asks for)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(".config"),
        metavar="FILE",
        help="configuration (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
