"""Generate with a model that doesn't fit the memory allowed: our runtime beside its peers.

    python scripts/experiments/offload/bench_offload.py \
        --work-dir /var/tmp/bench --json offload.json --plot offload.png
    python scripts/experiments/offload/bench_offload.py \
        --device cuda --gpu-budget-gib 6 --json offload_cuda.json

Every run is a process of its own, with the same model (random weights), prompt, threads and greedy
decoding. Without a GPU: a GPT-2 in a fresh memory cgroup, the files dropped from the page cache;
without the right to make a cgroup, RLIMIT_DATA stands in and the document says so. On a GPU: a
Llama in host memory, with torch's limit on the device's. The resident model has no limit and says
what the logits must be: our lossless runs must give them bit for bit. The last line of stdout is
one JSON document, whose fields docs/offload_benchmark.md names.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.files import check_writable
from lib.units import MIB, format_bytes
from scripts.experiments.offload.arguments import parse_arguments
from scripts.experiments.offload.cases import Case, find_contention, find_problems, summarize_cases
from scripts.experiments.offload.checkpoint import make_checkpoint
from scripts.experiments.offload.figures import Fields, add_ratios, compare_to_resident, table
from scripts.experiments.offload.host import describe_machine
from scripts.experiments.offload.page_cache import drop_page_cache
from scripts.experiments.offload.runner import PROMPT_TOKENS, Runner
from scripts.experiments.offload.settings import Setting
from scripts.experiments.offload.shapes import Shape
from scripts.experiments.offload.trained import TrainedModel, find_trained

_FIT = 1.2
"""Memory that a model takes without a limit, over that of its weights."""


def main(argv: Sequence[str] | None = None) -> int:
    args, setting = parse_arguments(argv)
    check_writable(args.json)
    check_writable(args.plot)
    document = OffloadBench(args, setting).run()
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

    def __init__(self, args: argparse.Namespace, setting: Setting) -> None:
        """Make the checkpoint where it isn't there yet."""
        self._args = args
        self._setting = setting
        shape: Shape | TrainedModel
        if args.trained:
            checkpoint, shape = find_trained()
        else:
            shape = setting.toy if args.quick else setting.shape
            checkpoint = make_checkpoint(shape, args.work_dir)
        budget = args.ours_budget_mib
        self._runner = Runner(
            folder=args.work_dir,
            checkpoint=checkpoint,
            shape=shape,
            threads=args.threads,
            reserve_bytes=args.reserve_mib * MIB,
            budget_bytes=None if budget is None else round(budget * MIB),
            num_tokens=args.tokens,
            machine=args.machine,
            device=setting.device,
            timeout_seconds=setting.timeout_seconds,
        )
        self._resident: Fields | None = None
        self._baseline_bytes: int | None = None
        self._gpu: Fields | None = None

    def run(self) -> Fields:
        """Prepare, measure round after round, and return the document."""
        cases = list(plan_cases(self._setting, self._args))
        self._prepare(cases)
        steps = [case for _ in range(self._args.rounds) for case in cases]
        bar = tqdm(steps, disable=not sys.stderr.isatty(), unit="run")
        for case in bar:
            bar.set_description(case.name)
            if case.reason is None:
                self._measure(case)
        runs = summarize_cases(cases)
        problems = find_problems(cases, runs)
        quality = None
        if self._args.quality is not None:
            attempt = self._runner.measure_quality(self._args.quality)
            quality = attempt.result
            if attempt.reason is not None:
                problems.append(f"quality: {attempt.reason}")
        setting, shape = self._setting, self._runner.shape
        on_gpu = setting.device == "cuda"
        groups = sorted({str(run.kind) for case in cases for run in case.limited})
        return {
            "machine": describe_machine(setting.device, self._args.threads, self._gpu),
            "model": {
                "family": shape.family,
                "shape": asdict(shape),
                "weight_bytes": shape.num_bytes(),
                "dtype": shape.dtype,
                "prompt_tokens": PROMPT_TOKENS,
            },
            "method": {
                "limit": ["torch.cuda.set_per_process_memory_fraction"] if on_gpu else groups,
                "page_cache": setting.page_cache,
                "link": setting.link,
                "rounds": self._args.rounds,
                "reserve_mib": self._args.reserve_mib,
                "import_anon_bytes": self._baseline_bytes,
                "contention": find_contention(cases),
            },
            "runs": runs,
            "ratios": add_ratios(runs, gpu_limit_mib=self._args.limits[0] if on_gpu else None),
            "quality": quality,
            "problems": problems,
        }

    def _prepare(self, cases: Sequence[Case]) -> None:
        """Let each system make its files. The libraries then are in the page cache, outside every
        group.
        """
        for system in dict.fromkeys(case.system for case in cases):
            reason = None
            if not system.is_installed():
                reason = f"not installed: {system.install}"
            elif system.needs_preparing or system is self._setting.resident:
                attempt = self._runner.prepare(system)
                reason = attempt.reason
                if system is self._setting.resident and attempt.result is not None:
                    self._baseline_bytes = attempt.result["anonymous_bytes"]
                    self._gpu = attempt.result.get("gpu")
            for case in cases:
                if case.system is system:
                    case.reason = reason
        needed = _FIT * self._runner.shape.num_bytes()
        if self._gpu is not None and needed > self._gpu["free_bytes"]:
            cases[0].impossible = True
            cases[0].reason = (
                f"not run: it needs about {format_bytes(needed)} of the GPU, which has "
                f"{format_bytes(self._gpu['free_bytes'])} free"
            )

    def _measure(self, case: Case) -> None:
        """Run a case once more, from a cold page cache where weights come from the disk."""
        if self._setting.cold:
            for folder in {self._args.work_dir, self._runner.checkpoint}:
                case.cached_bytes = max(case.cached_bytes, drop_page_cache(folder)[1])
        attempt = self._runner.measure(case.system, case.limit_mib)
        case.limited.append(attempt.limited)
        case.reason = attempt.reason
        if attempt.result is None:
            return
        if case.system is self._setting.resident and self._resident is None:
            self._resident = attempt.result
        if self._resident is not None:
            case.matches.append(compare_to_resident(attempt.result, self._resident))
        case.results.append(attempt.result)


def plan_cases(setting: Setting, args: argparse.Namespace) -> Iterator[Case]:
    """Yield what is to be run: the resident model, then ours and peers limit after limit."""
    yield Case(system=setting.resident, limit_mib=None)
    for limit in args.limits:
        for system in setting.systems[1:]:
            if args.only and system.name not in args.only:
                continue
            if system.drafts and not args.trained:  # random weights say nothing of a draft
                continue
            allowed = None if args.quick or args.trained else system.limits_mib
            if allowed is None or limit in allowed:
                yield Case(system=system, limit_mib=limit)


if __name__ == "__main__":
    sys.exit(run_main(main))
