"""Check that emulation tells the truth: the same plans, offloaded for real and emulated.

    python scripts/experiments/emulation/validate_emulation.py --json docs/results/emulation.json

Two copies of the model decode in turns, since disks and processors drift within seconds: one with
real offload; the other, its weights in memory, under the same plan on the wall clock. What is
emulated is measured in the same turn: the disk, with units of the plan's own sizes, and by what
share reading slows the model's compute. The error of a plan is that of the median token.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.load import load
from lib.commands.cli import emit_json, run_main
from lib.errors import InputError, PlacementError
from lib.files import check_writable
from lib.machine import MachineProfile, TierSpec, choose_machine
from lib.tiering import Clock, EmulationSpec, Runtime, attach, plan
from lib.tiering.probe.links import FileProbe
from lib.tiering.stores import default_spill_folder
from lib.units import MIB, format_bytes
from lib.vocabulary import Tier
from scripts.experiments.offload.checkpoint import GPT2_MEDIUM, TOY, make_checkpoint

_SHARES = ((None, 0.3), (None, 0.5), (None, 0.7), (None, 0.85), ("int8", 0.5), ("int4", 0.5))
"""Precision, and fast memory as a share of what the model takes at it: streamed in every case."""
_TOY_SHARES = ((None, 0.6), (None, 0.7), (None, 0.8), (None, 0.9), ("bf16", 0.8), ("int8", 0.9))
_SEGMENTS = 6
_PROBE_SECONDS = 0.3
_CONTENTION_SECONDS = 1.5
_NO_DISK = TierSpec("at once", 0, 1e6)
"""What leaves the compute alone."""
_PROMPT = 16


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    if args.tokens < _SEGMENTS:
        raise InputError(f"--tokens {args.tokens} must be {_SEGMENTS} or more: a segment's each")
    if args.threads < 1:
        raise InputError(f"--threads {args.threads} must be 1 or more")
    torch.set_num_threads(args.threads)
    machine = choose_machine(args.machine)
    work = Path(args.work_dir or default_spill_folder() / "tierhints-bench")
    checkpoint = args.model or make_checkpoint(TOY if args.quick else GPT2_MEDIUM, work)
    tokens = args.tokens
    shares = _TOY_SHARES if args.quick else _SHARES
    rows = [
        _compare(checkpoint, work / "emulation", precision, share, tokens, machine)
        for precision, share in tqdm(shares, desc="plans", leave=False, disable=None)
    ]
    document = {
        "model": checkpoint.name,
        "plans": len(rows),
        "median_abs_error_pct": statistics.median(abs(row["error_pct"]) for row in rows),
        "rows": rows,
    }
    print(_table(rows))
    print(
        f"\nmedian absolute error {document['median_abs_error_pct']:.1f} % over {len(rows)} plans, "
        f"median of {rows[0]['n']} tokens each\n"
    )
    emit_json(document, args.json)
    return 0


def _compare(
    checkpoint: Path,
    spill: Path,
    precision: str | None,
    share: float,
    tokens: int,
    machine: MachineProfile,
) -> dict[str, Any]:
    """Decode with a model offloaded for real and one emulated, in turns."""
    fast = int(_resident_bytes(checkpoint, precision, machine) * share)
    common: dict[str, Any] = {
        "budget": {"HBM": fast, "SSD": None},
        "precision": precision,
        "weights": checkpoint,
        # As in real mode: the plan must be the same.
        "machine": machine,
    }
    real_model, emulated_model = (load(checkpoint) for _ in range(2))
    with (
        attach(real_model, mode="real", spill_dir=spill, **common) as real,
        attach(emulated_model, mode="emulated", emulation=_machine(_NO_DISK, 0), **common) as other,
        FileProbe(spill, file_bytes=_file_bytes(real)) as probe,
        torch.inference_mode(),
    ):
        if other.plan != real.plan:
            raise PlacementError("the emulated plan is not the real one")
        decoders = [_Decoder(real_model), _Decoder(emulated_model)]
        contentions: list[float] = []
        disks: list[TierSpec] = []
        for _ in range(_SEGMENTS):
            before = _probe_disk(probe, real)
            decoders[0].run(tokens // _SEGMENTS)
            disk = _mean(before, _probe_disk(probe, real))
            other.emulation = _machine(_NO_DISK, 0)
            contention = probe.measure_contention(
                decoders[1].repeat, unit_bytes=real.plan.slot_bytes, seconds=_CONTENTION_SECONDS
            )
            other.emulation = _machine(disk, contention.slowdown)
            decoders[1].run(tokens // _SEGMENTS)
            contentions.append(contention.slowdown)
            disks.append(disk)
        stats, plan = real.stats(), real.plan
    if not torch.equal(decoders[0].logits, decoders[1].logits):
        raise PlacementError("emulated outputs are not the real ones")
    real_seconds, emulated_seconds = (statistics.median(each.seconds) for each in decoders)
    return {
        "precision": precision or "lossless",
        "budget_mib": fast / MIB,
        "slots": plan.num_slots,
        "slot_mib": plan.slot_bytes / MIB,
        "bytes_per_token": stats.bytes_moved / stats.forwards,
        "link_gb_s": statistics.median(disk.bandwidth_gb_s for disk in disks),
        "setup_us": statistics.median(disk.setup_us for disk in disks),
        "contention": statistics.median(contentions),
        "real_ms": real_seconds * 1e3,
        "emulated_ms": emulated_seconds * 1e3,
        "predicted_ms": plan.predicted.seconds * 1e3,
        "error_pct": (emulated_seconds / real_seconds - 1) * 100,
        "n": len(decoders[0].seconds),
    }


class _Decoder:
    """Decodes token after token with one model."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seconds: list[float] = []
        ids = torch.arange(_PROMPT).view(1, -1) * 31 % model.config.vocab_size
        self._output = model(ids, use_cache=True)
        self._first = self._token = self._output.logits[:, -1:].argmax(-1)

    @property
    def logits(self) -> torch.Tensor:
        """The last token's."""
        return self._output.logits

    def run(self, tokens: int) -> None:
        """Time so many tokens; the one before them, which was prefetched in a pause, is not."""
        for index in range(1 + tokens):
            start = time.perf_counter()
            cache = self._output.past_key_values
            self._output = self._model(self._token, past_key_values=cache, use_cache=True)
            if index:
                self.seconds.append(time.perf_counter() - start)
            self._token = self.logits[:, -1:].argmax(-1)

    def repeat(self) -> None:
        """Compute a token that isn't recorded as part of the text."""
        self._model(self._first, use_cache=False)


def _machine(disk: TierSpec, contention: float) -> EmulationSpec:
    return EmulationSpec(
        specs={Tier.SSD: disk}, clock=Clock.WALL, contention=contention, charge_hbm=False
    )


def _probe_disk(probe: FileProbe, runtime: Runtime) -> TierSpec:
    """Measure the disk with units of the plan's own sizes."""
    units = sorted(
        {size for placement in runtime.plan.placements.values() for size in placement.unit_bytes}
    )
    if not units:
        raise InputError("the plan streams nothing: there is no transfer to emulate")
    sizes = sorted({units[0], units[len(units) // 2], units[-1]})
    return probe.measure(sizes, seconds=_PROBE_SECONDS)


def _mean(first: TierSpec, second: TierSpec) -> TierSpec:
    """Return the disk between two measurements."""
    return TierSpec(
        "disk",
        (first.setup_us + second.setup_us) / 2,
        statistics.harmonic_mean((first.bandwidth_gb_s, second.bandwidth_gb_s)),
    )


def _resident_bytes(checkpoint: Path, precision: str | None, machine: MachineProfile) -> int:
    """Return the fast memory that the whole model takes at a precision, slots apart."""
    whole = plan(
        checkpoint, budget={"HBM": None}, precision=precision, machine=machine, device="cpu"
    )
    return whole.plan.fast_bytes


def _file_bytes(runtime: Runtime) -> int:
    """Return the bytes that a pass streams: a smaller file may lie in some cache below the disk."""
    streamed = sum(sum(placement.unit_bytes) for placement in runtime.plan.placements.values())
    return max(256 * MIB, streamed)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "precision   budget       slots         moved/token  link GB/s  real ms  emulated ms  error"
    ]
    lines += [
        f"{row['precision']:<11} {format_bytes(row['budget_mib'] * MIB):<12} "
        f"{row['slots']} x {format_bytes(row['slot_mib'] * MIB):<9} "
        f"{format_bytes(row['bytes_per_token']):<12} {row['link_gb_s']:<10.2f} "
        f"{row['real_ms']:<8.1f} {row['emulated_ms']:<12.1f} {row['error_pct']:+.1f} %"
        for row in rows
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare emulated with real offload, plan by plan.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong input. The last line of stdout is JSON.",
    )
    parser.add_argument(
        "--model", type=Path, help="checkpoint folder (default: GPT-2 medium's shape, made here)"
    )
    parser.add_argument("--quick", action="store_true", help="a toy model, to see that it works")
    parser.add_argument(
        "--tokens", type=int, default=24, help="timed tokens of each run (default: 24)"
    )
    parser.add_argument("--threads", type=int, default=2, help="compute threads (default: 2)")
    parser.add_argument("--machine", type=Path, help="machine.json that the plans are made for")
    parser.add_argument("--work-dir", type=Path, help="folder on the disk to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document here too")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
