"""Check that a declared quality bound is kept: hold a model under epsilon, and measure its KL.

    python scripts/experiments/epsilon/verify_epsilon.py --model runs/quickstart/checkpoint \
        --tier-hints runs/quickstart/tier_hints.json --runs 20

Every run has an epsilon of its own, evenly spread on a log scale. The model is attached under
epsilon, as a user would, and measured as it runs against the full one, on sequences that the run's
seed draws; others of them serve the joint check that the runtime makes before it lets a plan stand.

The first of four groups of runs takes the hints as they are: does this file keep the bound? One
calibration may be lucky, so the other groups make their own from the same model, each with its own
text, labels and probes: does the procedure keep it? Up to 5 runs, or with ``--calibrations 1``,
there is one group, the hints'.
All are judged on text that no calibration saw. stdout gets a row per run and, as its last line, one
JSON document:

    {"held": k, "runs": n, "rows": [{"seed", "epsilon", "predicted", "bound", "measured", ...}]}

The joint check can mend what the ledger has let pass. So a row says how often it did
(``floors_raised``), and ``by_ledger`` is the KL of the plan that the ledger admits by itself; null
where it admits none. ``trivial`` counts the runs in which everything stayed lossless.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import cast_weights, load_model, quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import parse_device
from lib.commands.text_flags import read_held_out
from lib.errors import InputError
from lib.evaluation.calibrate import calibrate_model, calibrated_hints
from lib.evaluation.calibration import check_hints
from lib.evaluation.canary import CANARY_SEQUENCES, measure_kl
from lib.evaluation.forwards import ForwardBench
from lib.evaluation.kernel_error import measure_kernels
from lib.files import check_writable
from lib.hints import Hints, load_hints
from lib.precision.floors import parse_epsilon, read_trust
from lib.text.held_out import HELDOUT_FILE, load_heldout, load_library_text, sequence_length
from lib.text.parts import cut_parts, vocabulary_size
from lib.tiering import attach

CALIBRATIONS = 4
RUNS_PER_CALIBRATION = 5
VERDICT_SEQUENCES = 32
"""Of each run, beside those of the canary; a short text gives fewer, in the same proportion."""
LEAST_CANARY = 4
LEAST_JUDGING = 10
"""Sequences to judge on, the canary's among them; all runs take the same ones if there are few."""
LEAST_CALIBRATION = 8
"""Sequences of a calibration, half of them for gradients."""
LENGTH = 128
BATCH_SIZE = 8
_TEXT_SEQUENCES = 288
"""Read of the user's text: a third to judge on, the rest for three calibrations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Sequences (N, T) to judge on, which no calibration saw, and to calibrate on."""

    judging: Tensor
    calibration: Tensor
    source: str

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the sequences of the canary and of the verdict in a run."""
        count = min(len(self.judging), CANARY_SEQUENCES + VERDICT_SEQUENCES)
        share = count * CANARY_SEQUENCES // (CANARY_SEQUENCES + VERDICT_SEQUENCES)
        canary = max(share, LEAST_CANARY)
        return canary, count - canary

    def draw(self, seed: int) -> tuple[Tensor, Tensor]:
        """Return a run's sequences: the canary's and the verdict's."""
        generator = torch.Generator().manual_seed(seed)
        canary, verdict = self.sizes
        order = torch.randperm(len(self.judging), generator=generator)
        return self.judging[order[:canary]], self.judging[order[canary : canary + verdict]]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    epsilons = spread(parse_epsilon(args.smallest), parse_epsilon(args.largest), args.runs)
    if args.calibrations < 1:
        raise InputError(f"--calibrations {args.calibrations} must be at least 1")
    check_writable(args.json)
    device = parse_device(args.device)
    hints = load_hints(args.tier_hints)
    read_trust(hints.quality)
    quiet_transformers(progress=False)
    model: Any = load_model(args.model)
    check_hints(hints, model)
    model.to(device)
    pools = open_pools(args, model, hints)
    count = min(
        args.calibrations,
        math.ceil(args.runs / RUNS_PER_CALIBRATION),
        1 + len(pools.calibration) // LEAST_CALIBRATION,
    )
    calibrations = [hints, *recalibrate(args.model, model, hints, pools, count - 1, device=device)]
    canary, verdict = pools.sizes
    print(
        f"KL measured on {verdict} of {len(pools.judging)} sequences per run, {canary} others for "
        f"the joint check, {count - 1} calibrations on {len(pools.calibration)}: {pools.source}\n"
    )
    columns = ("epsilon", "predicted", "bound", "measured", "by ledger")
    titles = "  ".join(f"{column:>9}" for column in columns)
    print(f"{'':4}  hints  {titles}  raised  held in")
    rows = []
    for seed, epsilon in enumerate(tqdm(epsilons, disable=not sys.stderr.isatty(), leave=False)):
        which = seed % count
        row = verify(model, calibrations[which], epsilon, *pools.draw(seed), device=device)
        rows.append({"seed": seed, "calibration": which, **row})
        print(row_text(rows[-1]), flush=True)
    held = sum(row["held"] for row in rows)
    own = [row["held"] for row in rows if row["calibration"] == 0]
    above = sum(row["interval"][1] > row["epsilon"] for row in rows)
    alone = [row["by_ledger"]["held"] for row in rows if row["by_ledger"] is not None]
    trivial = sum(row["bound"] == 0 for row in rows)
    print(
        f"\nmeasured KL within epsilon in {held} of {len(rows)} runs, in {sum(own)} of {len(own)} "
        f"with these hints; {above} of the 95 % intervals reach above it\nby the ledger alone, "
        f"without the joint check: in {sum(alone)} of the {len(alone)} runs that it admits; in "
        f"{trivial} runs everything stayed lossless\n"
    )
    document = {
        "held": held,
        "runs": len(rows),
        "held_by_these_hints": sum(own),
        "runs_of_these_hints": len(own),
        "held_by_ledger": sum(alone),
        "runs_by_ledger": len(alone),
        "trivial": trivial,
        "intervals_above": above,
        "text": pools.source,
        "judging_sequences": len(pools.judging),
        "canary_sequences": canary,
        "verdict_sequences": verdict,
        "calibrations": [
            {"text": each.quality.get("text"), **vars_of(each.quality)} for each in calibrations
        ],
        "rows": rows,
    }
    emit_json(document, args.json)
    return 0


def spread(smallest: float, largest: float, count: int) -> list[float]:
    """Return epsilons evenly spaced on a log scale."""
    if count < 1:
        raise InputError(f"--runs {count} is too few: give 1 or more")
    if smallest > largest:
        raise InputError(f"--smallest {smallest:g} is above --largest {largest:g}: swap them")
    return [float(value) for value in np.geomspace(smallest, largest, count)]


def vars_of(quality: Any) -> dict[str, Any]:
    """Return what a calibration's safety margin is made of."""
    names = ("pair_factor", "plan_factor", "conformal_factor", "conformal_probes", "kernels")
    return {name: quality.get(name) for name in names}


def open_pools(args: argparse.Namespace, model: Any, hints: Hints) -> Pools:
    """Return the text. A checkpoint's own held-out text calibrates, and other documents judge;
    of any other text the third part judges, which ``tierhints calibrate`` leaves out.
    """
    length = min(sequence_length(model.config, None), LENGTH)
    if args.data is None and (Path(args.model) / HELDOUT_FILE).exists():
        unseen = load_library_text(args.model, length=length)
        own = load_heldout(args.model, vocab_size=vocabulary_size(model), length=length)
        judging, source = unseen.tokens[::2], unseen.source
        calibration = torch.cat([own.tokens, unseen.tokens[1::2]])
    else:
        known = hints.quality.get("text") or {}
        args.default_length = length
        args.sequence_length = known.get("sequence_length") or length
        args.seed = known.get("seed") or 0
        args.samples = math.ceil(_TEXT_SEQUENCES * length / args.sequence_length)
        parts = cut_parts(read_held_out(args, model), seed=args.seed)
        judging, source = _cut(parts.judging, length), parts.source
        calibration = _cut(torch.cat([parts.fisher, parts.calibration]), length)
    if len(judging) < LEAST_JUDGING:
        raise InputError(
            f"{source} has {len(judging)} sequences of {length} tokens to judge on, fewer than "
            f"{LEAST_JUDGING}: give more text with --data"
        )
    return Pools(judging=judging, calibration=calibration, source=source)


def recalibrate(
    folder: str, model: Any, hints: Hints, pools: Pools, count: int, *, device: torch.device
) -> list[Hints]:
    """Calibrate anew, ``count`` times, each on a part of the text of its own."""
    if not count:
        return []
    full: Any = load_model(folder)
    cast_weights(full, torch.float32)
    full.to(device)
    order = torch.randperm(len(pools.calibration), generator=torch.Generator().manual_seed(0))
    made = []
    for seed, rows in enumerate(torch.tensor_split(order, count), 1):
        text = pools.calibration[rows]
        found = calibrate_model(
            full,
            text[::2],
            text[1::2],
            folder=folder,
            hints=hints,
            vocab_size=vocabulary_size(model),
            seed=seed,
        )
        kernels = measure_kernels(model, text[1::2], device=device)
        made.append(calibrated_hints(hints, found, kernels=kernels, text={"sequences": len(text)}))
    return made


def verify(
    model: Any,
    hints: Hints,
    epsilon: float,
    canary_tokens: Tensor,
    verdict_tokens: Tensor,
    *,
    device: torch.device,
) -> dict[str, Any]:
    """Attach the model under epsilon, measure it, and say whether it has kept the bound."""
    verdict = ForwardBench(
        model,
        verdict_tokens,
        batch_size=BATCH_SIZE,
        warmup=0,
        device=device,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        verdict.save_reference(folder)
        canary = measure_kl(model, canary_tokens, batch_size=BATCH_SIZE)
        held = partial(
            attach,
            model,
            hints,
            budget={"HBM": None, "SSD": None},  # all in fast memory, the originals beside
            epsilon=epsilon,
            device=device,
        )
        with held(measure=canary) as runtime:
            quality = verdict.compare_reference(folder)
            places = list(runtime.plan.placements.values())
            veto = runtime.veto.to_json()
        try:
            alone = held()
        except InputError:  # the hints' kernels are another machine's: only measured plans stand
            by_ledger = None
        else:
            with alone:
                kl_nats = verdict.compare_reference(folder).kl_nats
            by_ledger = {"measured": kl_nats, "held": kl_nats <= epsilon}
    precisions = [str(place.precision) for place in places]
    return {
        "epsilon": epsilon,
        "predicted": veto["predicted_nats"],
        "bound": veto["bound_nats"],
        "measured": quality.kl_nats,
        "interval": list(quality.kl_interval or ()),
        "held": quality.kl_nats <= epsilon,
        "floors_raised": veto["floors_raised"],
        "by_ledger": by_ledger,
        "perplexity": quality.perplexity,
        "reference_perplexity": quality.reference_perplexity,
        "bytes": sum(place.stored_bytes for place in places),
        "precisions": {name: precisions.count(name) for name in dict.fromkeys(precisions)},
        "refused": veto["rejections"],
    }


def row_text(row: dict[str, Any]) -> str:
    numbers = [row[name] for name in ("epsilon", "predicted", "bound", "measured")]
    alone = row["by_ledger"]
    cells = "  ".join(f"{number:9.2e}" for number in numbers)
    cells += f"  {'refused' if alone is None else format(alone['measured'], '.2e'):>9}"
    cells += f"  {row['floors_raised']:6}"
    held = ", ".join(f"{name} {count}" for name, count in row["precisions"].items())
    which = row["calibration"] or "given"
    return f"{row['seed']:4}  {which:>5}  {cells}  {held}{'' if row['held'] else '   ABOVE'}"


def _cut(tokens: Tensor, length: int) -> Tensor:
    """Cut sequences into shorter ones."""
    count = tokens.shape[1] // length
    return tokens[:, : count * length].reshape(-1, length)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Place a model under a range of quality bounds and measure whether they hold.",
        epilog="Exit codes: 0 done (whatever the result), 1 failed, 2 wrong input. The last line "
        "of stdout is JSON.",
    )
    default = "(default: %(default)s)"
    parser.add_argument("--model", required=True, help="folder or hub id of a causal LM checkpoint")
    parser.add_argument(
        "--tier-hints", required=True, type=Path, metavar="FILE", help="its calibrated hints"
    )
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="UTF-8 text: a file, a folder or a glob; of the text that the hints were calibrated "
        "on, the part that was left out (default: held-out documents of the standard library)",
    )
    parser.add_argument("--runs", type=int, default=20, metavar="N", help=default)
    parser.add_argument(
        "--calibrations",
        type=int,
        default=CALIBRATIONS,
        metavar="N",
        help=f"groups of runs, each but the first with a calibration of its own {default}",
    )
    parser.add_argument("--smallest", default="0.00001", metavar="BOUND", help=f"epsilon {default}")
    parser.add_argument("--largest", default="0.1", metavar="BOUND", help=f"epsilon {default}")
    parser.add_argument("--device", default="auto", help=f"auto, cpu, cuda or cuda:N {default}")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
