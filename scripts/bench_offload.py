"""Generate with a model that doesn't fit the memory allowed: our runtime beside its peers.

    python scripts/bench_offload.py --work-dir /var/tmp/bench --json offload.json --plot offload.png

Every run is a process of its own in a fresh memory cgroup, with the same GPT-2 (random weights),
prompt, threads and greedy decoding; before it, the files are dropped from the page cache. Without
the right to make a cgroup, RLIMIT_DATA stands in and the document says so. The resident model has
no limit and says what the logits must be: our lossless runs must give them bit for bit. The last
line of stdout is one JSON document, whose fields docs/offload_benchmark.md names.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from lib.errors import InputError
from lib.files import check_writable
from lib.machine import load_machine
from lib.units import MIB
from scripts.cli import emit_json, run_main
from scripts.offload.cases import Case, summarize_cases
from scripts.offload.checkpoint import GPT2_MEDIUM, TOY, make_checkpoint
from scripts.offload.figures import Fields, add_ratios, compare_to_resident, table
from scripts.offload.page_cache import drop_page_cache
from scripts.offload.runner import PROMPT_TOKENS, Runner
from scripts.offload.systems import RESIDENT, SYSTEMS

LIMITS_MIB = (1500, 1100, 900, 700, 600)
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "airllm")
DEFAULT_RUN = Path("runs/quickstart")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    _check_arguments(args)
    check_writable(args.json)
    check_writable(args.plot)
    bench = OffloadBench(args)
    document = bench.run()
    print(table(document["runs"]), end="\n\n")
    if args.plot is not None:
        from lib.report.offload_plots import plot_offload

        plot_offload(document, args.plot)
    emit_json(document, args.json)
    for problem in document["problems"]:
        print(f"failed: {problem}", file=sys.stderr)
    return 1 if document["problems"] else 0


class OffloadBench:
    """The runs of one command line."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Make the checkpoint where it isn't there yet."""
        self._args = args
        shape = TOY if args.quick else GPT2_MEDIUM
        budget = args.ours_budget_mib
        self._runner = Runner(
            folder=args.work_dir,
            checkpoint=make_checkpoint(shape, args.work_dir),
            shape=shape,
            threads=args.threads,
            reserve_bytes=args.reserve_mib * MIB,
            budget_bytes=None if budget is None else round(budget * MIB),
            num_tokens=args.tokens,
            machine=args.machine,
        )
        self._resident: Fields | None = None
        self._baseline_bytes: int | None = None

    def run(self) -> Fields:
        """Prepare, measure round after round, and return the document."""
        cases = list(self._cases())
        self._prepare(cases)
        steps = [case for _ in range(self._args.rounds) for case in cases]
        bar = tqdm(steps, disable=not sys.stderr.isatty(), unit="run")
        for case in bar:
            bar.set_description(case.name)
            if case.reason is None:
                self._measure(case)
        runs = summarize_cases(cases)
        problems = _find_problems(cases, runs)
        quality = None
        if self._args.quality is not None:
            attempt = self._runner.measure_quality(self._args.quality)
            quality = attempt.result
            if attempt.reason is not None:
                problems.append(f"quality: {attempt.reason}")
        return {
            "machine": _describe_machine(self._args.threads),
            "model": {
                "shape": asdict(self._runner.shape),
                "weight_bytes": self._runner.shape.num_bytes(),
                "dtype": "float32",
                "prompt_tokens": PROMPT_TOKENS,
            },
            "method": {
                "limit": sorted({str(run.kind) for case in cases for run in case.limited}),
                "page_cache": "files dropped before each run",
                "link": "FileProbe before, between and after the segments of each run",
                "rounds": self._args.rounds,
                "reserve_mib": self._args.reserve_mib,
                "import_anon_bytes": self._baseline_bytes,
            },
            "runs": runs,
            "ratios": add_ratios(runs),
            "quality": quality,
            "problems": problems,
        }

    def _cases(self) -> Iterator[Case]:
        """Yield what is to be run, ours and peers of one limit after each other."""
        yield Case(system=RESIDENT, limit_mib=None)
        for limit in self._args.limits:
            for system in SYSTEMS:
                if system is RESIDENT or self._args.only and system.name not in self._args.only:
                    continue
                allowed = None if self._args.quick else system.limits_mib
                if allowed is None or limit in allowed:
                    yield Case(system=system, limit_mib=limit)

    def _prepare(self, cases: Sequence[Case]) -> None:
        """Let each system make its files. The libraries then are in the page cache, outside every
        group.
        """
        for system in dict.fromkeys(case.system for case in cases):
            reason = None
            if not system.is_installed():
                reason = f"not installed: {system.install}"
            elif system.prepare is not None or system is RESIDENT:
                attempt = self._runner.prepare(system)
                reason = attempt.reason
                if system is RESIDENT and attempt.result is not None:
                    self._baseline_bytes = attempt.result["anonymous_bytes"]
            for case in cases:
                if case.system is system:
                    case.reason = reason

    def _measure(self, case: Case) -> None:
        """Run a case once more, from a cold page cache."""
        case.cached_bytes = max(case.cached_bytes, drop_page_cache(self._args.work_dir)[1])
        attempt = self._runner.measure(case.system, case.limit_mib)
        case.limited.append(attempt.limited)
        case.reason = attempt.reason
        if attempt.result is None:
            return
        if case.system is RESIDENT and self._resident is None:
            self._resident = attempt.result
        if self._resident is not None:
            case.matches.append(compare_to_resident(attempt.result, self._resident))
        case.results.append(attempt.result)


def _find_problems(cases: Sequence[Case], runs: Sequence[Fields]) -> list[str]:
    """Return what must not be: a run of ours that failed, or a lossless one that lost something."""
    problems = []
    for case, run in zip(cases, runs, strict=True):
        if case.system.peer:
            continue
        if not run["survived"]:
            problems.append(f"{case.name}: {case.reason}")
        elif case.system.exact and not (run["match"] and run["match"]["bit_equal"]):
            problems.append(f"{case.name}: logits are not the resident model's bit for bit")
    return problems


def _describe_machine(threads: int) -> Fields:
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    """Return the processor's name as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse what can't be run, and fill in what follows from other arguments."""
    for flag, value, least in (
        ("--rounds", args.rounds, 1),
        ("--threads", args.threads, 1),
        ("--tokens", args.tokens, 2),
        ("--reserve-mib", args.reserve_mib, 0),
    ):
        if value is not None and value < least:
            raise InputError(f"{flag} {value} is too small: give {least} or more")
    names = [system.name for system in SYSTEMS]
    for name in args.only or ():
        if name not in names:
            raise InputError(f"--only {name!r} is unknown; allowed: {', '.join(names)}")
    if args.machine is not None:
        load_machine(args.machine)
    if args.quick:
        args.limits = args.limits or (700,)
        args.tokens = args.tokens or 4
        args.ours_budget_mib = args.ours_budget_mib or TOY.num_bytes() / MIB / 2
    args.limits = args.limits or LIMITS_MIB
    if args.quality is None and not args.quick and (DEFAULT_RUN / "checkpoint").is_dir():
        args.quality = DEFAULT_RUN
    if args.quality is not None and not (args.quality / "checkpoint" / "config.json").exists():
        raise InputError(f"--quality {args.quality} has no checkpoint: give the folder of a run")
    if min(args.limits) <= 0:
        raise InputError(f"--limits {min(args.limits)} must be positive: give MiB")
    if args.work_dir is None:
        from lib.tiering.stores import default_spill_folder

        args.work_dir = default_spill_folder() / "tierhints-bench"
    args.work_dir.mkdir(parents=True, exist_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Benchmark our offload runtime and its peers under the same memory limits.",
        epilog="Exit codes: 0 done, 1 a run of ours failed or was not exact, 2 wrong input. The "
        "last line of stdout is JSON.",
    )
    what = parser.add_argument_group("what is run")
    what.add_argument(
        "--limits",
        nargs="+",
        type=int,
        metavar="MIB",
        help=f"memory limits (default: {' '.join(map(str, LIMITS_MIB))})",
    )
    what.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="these systems, and the resident one: "
        + ", ".join(system.name for system in SYSTEMS[1:]),
    )
    what.add_argument(
        "--rounds", type=int, default=1, help="interleaved repetitions (default: %(default)s)"
    )
    what.add_argument(
        "--quick", action="store_true", help="a toy model and few tokens, to see that it works"
    )
    what.add_argument(
        "--quality",
        type=Path,
        metavar="RUN_FOLDER",
        help="trained model to measure perplexity and KL of int8 and int4 on (default: "
        f"{DEFAULT_RUN} where it is there; not with --quick)",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="timed tokens of each run (default: "
        + ", ".join(f"{system.name} {system.num_tokens}" for system in SYSTEMS)
        + ")",
    )
    how.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="compute threads (default: %(default)s)"
    )
    how.add_argument(
        "--reserve-mib",
        type=int,
        default=64,
        help="of the limit, what our weights leave to activations, the KV cache and the allocator "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--ours-budget-mib",
        type=float,
        metavar="MIB",
        help="budget of our weights (default: the limit, less the process's own and the reserve)",
    )
    how.add_argument(
        "--machine",
        type=Path,
        metavar="FILE",
        help="machine.json that ours plans with (default: the planner's own figures)",
    )
    output = parser.add_argument_group("files")
    output.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="for checkpoint and offloaded weights, on the disk to measure (default: below TMPDIR "
        "or /var/tmp)",
    )
    output.add_argument("--plot", type=Path, metavar="FILE", help="PNG of tokens/s and memory")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the document here too")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
