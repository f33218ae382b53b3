"""Check that exact output is the full model's text, over many tokens.

    python scripts/experiments/exact/verify_exact.py --model runs/demo/model \
        --tier-hints hints/smollm2-135m-instruct.tier_hints.json --tokens 20000 --strict-tokens 2000

The same model answers prompts twice: as plain ``generate`` has it, all in memory, and attached with
``exact`` under a budget of part of its weights, which stream. Batches are of one kind of text
(``prompts.py``), padded on the left, greedy and sampled in turn. Sampled text is compared with what
docs/exact.md defines: plain ``generate`` takes the largest score after the processors of a setting
and the noise of the same seed. After a difference the texts part; what comes behind it in its
sequence doesn't count. ``strict`` takes one sequence at a time.

A difference is allowed where it is a near tie: exact output has plain ``generate``'s second token,
and the two largest scores are closer than ``runtime.tolerance``, which is measured at the start
(times what a temperature below 1 pulls logits apart). Exit code 1 where another one was found, or
any with ``strict``. stdout ends with one JSON document:

    {"greedy": {"tokens", "differences", "within_tolerance", "near_ties": n, "listed": [...],
                "largest_gap"}, "sampled": {...}, "strict": {...}, ...}
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.load import load
from lib.checkpoint.models import load_model, quiet_transformers
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import add_hints_flag, add_model_flag, whole_number
from lib.errors import InputError
from lib.files import check_writable, write_json
from lib.progressive.attach import Exact, attach
from lib.progressive.exact import ExactRuntime
from lib.progressive.verify import Chooser
from lib.text.held_out import load_tokenizer
from scripts.experiments.exact.prompts import KINDS, read_prompts

Settings = dict[str, Any]
SAMPLINGS: tuple[Settings, ...] = (
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.95},
)
MODES = ("greedy", "sampled", "strict")
RUNS: tuple[tuple[Exact, Sequence[str]], ...] = ((True, MODES[:2]), ("strict", MODES[2:]))
_SEEDS = 1_000_003


@dataclass(slots=True, kw_only=True)
class Tally:
    """What comparing has come to."""

    tokens: int = 0
    texts: int = 0
    near_ties: int = 0
    """Tokens of plain ``generate`` whose two largest scores are closer than the tolerance."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """The differences."""

    @property
    def outside(self) -> list[dict[str, Any]]:
        return [each for each in self.listed if not each["near_tie"]]

    def to_json(self) -> dict[str, Any]:
        gaps = [each["gap"] for each in self.listed]
        return {
            "tokens": self.tokens,
            "texts": self.texts,
            "differences": len(self.listed),
            "within_tolerance": len(self.listed) - len(self.outside),
            "near_ties": self.near_ties,
            "largest_gap": max(gaps, default=None),
            "listed": self.listed,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What plain ``generate`` wrote for a batch. Of each new token: the gap of the two largest
    scores, and the second; both (B, T).
    """

    new_BT: Tensor
    gaps_BT: Tensor
    seconds_BT: Tensor


class Noise:
    """A logits processor that comes last: adds the noise of a seed, and keeps what is near."""

    def __init__(self, seed: int | None, prompt_tokens: int) -> None:
        self._chooser = Chooser(None, seed)
        self._prompt_tokens = prompt_tokens
        self.gaps: list[Tensor] = []
        self.seconds: list[Tensor] = []

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        number = ids_BT.shape[1] - self._prompt_tokens
        noisy_BV = torch.stack(
            [
                self._chooser.noisy(scores_V, sequence=sequence, number=number)
                for sequence, scores_V in enumerate(scores_BV)
            ]
        )
        values_B2, tokens_B2 = noisy_BV.topk(2)
        self.gaps.append(values_B2[:, 0] - values_B2[:, 1])
        self.seconds.append(tokens_B2[:, 1])
        return noisy_BV


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    quiet_transformers(progress=False)
    tokenizer = load_tokenizer(args.model)
    plain: Any = load_model(args.model)
    context = getattr(plain.config, "max_position_embeddings", sys.maxsize)
    total = sum(parameter.nbytes for parameter in plain.parameters())
    budget = {"HBM": int(args.share * total), "SSD": None}
    tallies = {mode: Tally() for mode in MODES}
    document: dict[str, Any] = {
        **{mode: tally.to_json() for mode, tally in tallies.items()},
        "model": args.model,
        "tier_hints": None if args.tier_hints is None else str(args.tier_hints),
        "budget_share": args.share,
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "samplings": list(SAMPLINGS),
        "torch": torch.__version__,
        "tolerance": {},
        "drafting": {},
    }
    begin = time.perf_counter()
    for exact, modes in RUNS:
        wanted = args.strict_tokens if exact == "strict" else args.tokens // 2
        if not wanted:
            continue
        model: Any = load(args.model)
        with attach(
            model, args.tier_hints, budget=budget, weights=args.model, exact=exact
        ) as runtime:
            assert isinstance(runtime, ExactRuntime)
            document["tolerance"][str(exact)] = runtime.tolerance
            rows = 1 if exact == "strict" else args.batch
            for mode, kind, settings, prompts, seed in batches(args, tokenizer, modes, rows):
                if all(tallies[each].tokens >= wanted for each in modes):
                    break
                if tallies[mode].tokens >= wanted:
                    continue
                ids_BT, mask_BT = pad(prompts, tokenizer)
                new_tokens = min(args.new_tokens, context - ids_BT.shape[1])
                if new_tokens < 2:
                    raise InputError(
                        f"a prompt of {ids_BT.shape[1]} tokens leaves no text of the model's "
                        f"context of {context}: give a lower --prompt-tokens"
                    )
                want = write_plain(plain, ids_BT, mask_BT, settings, new_tokens, seed)
                torch.manual_seed(seed)
                given = model.generate(
                    ids_BT,
                    attention_mask=mask_BT,
                    max_new_tokens=new_tokens,
                    **(settings or {"do_sample": False}),
                )
                compare(
                    tallies[mode],
                    want,
                    given[:, ids_BT.shape[1] :],
                    ends=_ends(plain),
                    tolerance=runtime.tolerance / min(1.0, settings.get("temperature", 1.0)),
                    where={"kind": kind, "seed": seed, **settings},
                )
                _say(tallies, time.perf_counter() - begin)
                document["drafting"][str(exact)] = _drafting(runtime)
                document.update({name: each.to_json() for name, each in tallies.items()})
                if args.json is not None:
                    write_json(document, args.json)  # a run of hours may be ended
    for mode, tally in tallies.items():
        print(
            f"{mode:8} {tally.tokens} tokens of {tally.texts} texts: {len(tally.listed)} "
            f"differences, {len(tally.outside)} of them no near ties"
        )
    emit_json(document, args.json)
    strict = tallies["strict"].listed
    return int(bool(strict) or any(tally.outside for tally in tallies.values()))


def batches(
    args: argparse.Namespace, tokenizer: Any, modes: Sequence[str], rows: int
) -> Iterator[tuple[str, str, Settings, list[list[int]], int]]:
    """Yield mode, kind, settings of sampling (none: greedy), prompts and seed, without end."""
    number = 0
    while True:
        for kind in KINDS:
            for sampling in ({}, SAMPLINGS[number % len(SAMPLINGS)]):
                seed = args.seed * _SEEDS + number
                prompts = read_prompts(
                    tokenizer, kind, count=rows, tokens=args.prompt_tokens, seed=seed
                )
                settings = {"do_sample": True, **sampling} if sampling else {}
                mode = modes[0] if len(modes) == 1 else modes[bool(sampling)]
                yield mode, kind, settings, prompts, seed
            number += 1


def pad(prompts: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return prompts as ids (B, T), padded on the left, and what is text of them."""
    longest = max(map(len, prompts))
    filler = tokenizer.pad_token_id or 0
    ids = [[filler] * (longest - len(each)) + each for each in prompts]
    mask = [[0] * (longest - len(each)) + [1] * len(each) for each in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def write_plain(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, settings: Settings, new_tokens: int, seed: int
) -> Texts:
    """Let plain ``generate`` write what exact output is defined to be."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as kinds

    torch.manual_seed(seed)
    noise_seed = int(torch.randint(2**31 - 1, (1,))) if settings else None
    processors: list[Any] = []
    if settings:
        processors.append(kinds.TemperatureLogitsWarper(settings["temperature"]))
        if settings["top_k"]:
            processors.append(kinds.TopKLogitsWarper(settings["top_k"]))
        if settings["top_p"] < 1:
            processors.append(kinds.TopPLogitsWarper(settings["top_p"]))
    noise = Noise(noise_seed, ids_BT.shape[1])
    texts_BT = model.generate(
        ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([*processors, noise]),
    )
    return Texts(
        new_BT=texts_BT[:, ids_BT.shape[1] :],
        gaps_BT=torch.stack(noise.gaps, dim=1),
        seconds_BT=torch.stack(noise.seconds, dim=1),
    )


def compare(
    tally: Tally,
    want: Texts,
    given_BT: Tensor,
    *,
    ends: set[int],
    tolerance: float,
    where: dict[str, Any],
) -> None:
    """Count what is equal up to each sequence's end, or to its first difference, which is kept."""
    for row, wanted_T in enumerate(want.new_BT.tolist()):
        given_T = given_BT[row].tolist()
        tally.texts += 1
        for place, token in enumerate(wanted_T):
            gap = float(want.gaps_BT[row, place])
            tally.tokens += 1
            tally.near_ties += gap < tolerance
            got = given_T[place] if place < len(given_T) else None
            if got != token:
                second = got == int(want.seconds_BT[row, place])
                found = {
                    "sequence": row,
                    "place": place,
                    "gap": gap,
                    "tolerance": tolerance,
                    "second_token": second,
                    "near_tie": second and gap < tolerance,
                }
                tally.listed.append({**where, **found})
                break
            if token in ends:
                break


def _ends(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _drafting(runtime: ExactRuntime) -> dict[str, Any]:
    stats = runtime.stats()
    return {
        "precision": runtime.draft.name,
        "windows": stats.drafting.windows,
        "drafted": stats.drafting.drafted,
        "accepted": stats.drafting.accepted,
        "rejected": stats.drafting.rejected,
        "redone": stats.drafting.redone,
        "bytes_moved": stats.bytes_moved,
    }


def _say(tallies: dict[str, Tally], seconds: float) -> None:
    done = ", ".join(
        f"{mode} {tally.tokens} tokens, {len(tally.listed)} differences"
        for mode, tally in tallies.items()
        if tally.texts
    )
    print(f"{seconds:.0f} s: {done}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare exact output with plain generate, token by token.",
        epilog="Exit codes: 0 equal but for near ties, 1 not, 2 wrong input. The last line of "
        "stdout is JSON.",
    )
    default = "(default: %(default)s)"
    add_model_flag(parser)
    add_hints_flag(parser)
    count = whole_number(0)
    parser.add_argument(
        "--tokens", type=count, default=20_000, metavar="N", help=f"half of them sampled {default}"
    )
    parser.add_argument(
        "--strict-tokens", type=count, default=0, metavar="N", help=f"with strict {default}"
    )
    parser.add_argument(
        "--batch",
        type=whole_number(1),
        default=16,
        metavar="N",
        help=f"sequences at once {default}",
    )
    parser.add_argument(
        "--prompt-tokens", type=whole_number(2), default=48, metavar="N", help=default
    )
    parser.add_argument(
        "--new-tokens", type=whole_number(2), default=128, metavar="N", help=f"at most {default}"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.45,
        metavar="S",
        help=f"of the weights' bytes, the fast memory's {default}",
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N", help=default)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the JSON document here as well"
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
