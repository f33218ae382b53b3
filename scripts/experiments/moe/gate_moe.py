"""Judge whether a trained mixture of experts is fit to judge policies of residency on.

    python scripts/experiments/moe/gate_moe.py --model runs/moe-quickstart/checkpoint

Reads held-out documents of the run's corpus, which are tagged by kind, and says for each layer how
much the expert tells of the kind (normalised mutual information, beside controls whose documents
have shuffled kinds) and how evenly experts are used; and, with the documents one after another as a
decoder would meet them, how often an LRU cache of some of the experts has the one that is asked
for. An untrained router gives the hit rate capacity / experts, whatever the policy. Exits with 1
unless every check holds.
"""

import argparse
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.errors import InputError
from lib.files import check_writable

if TYPE_CHECKING:
    from torch import nn

SHUFFLES = 20
SHARES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
JUDGED_SHARE = 0.25
LEAST_GAIN = 0.10  # of the hit rate above capacity / experts
LEAST_ENTROPY = 0.8  # of the logarithm of the number of experts

Routes = NDArray[np.int64]
"""(tokens, layers, k) chosen experts, in the order of the text."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, read, judge, print."""
    args = _parser().parse_args(argv)
    check_writable(args.json)
    from lib.checkpoint.models import load_model, quiet_transformers
    from lib.config import load_config
    from lib.text.held_out import load_tokenizer
    from lib.text.sources import open_source

    quiet_transformers(progress=False)
    data = load_config(args.config or args.model.parent / ".config").data
    model: Any = load_model(str(args.model)).eval()
    tokenizer = load_tokenizer(str(args.model))
    num_experts = int(getattr(model.config, "num_experts", 0))
    routes: list[Routes] = []
    kinds: list[str] = []
    for document in open_source(data).documents():
        if document.heldout and document.kind:
            ids = tokenizer(document.text, verbose=False)["input_ids"][: args.tokens]
            routes.append(route(model, ids))
            kinds.append(document.kind)
    if len(set(kinds)) < 2 or not num_experts:
        raise InputError(
            f"{args.model} and its corpus ({data.source}) give no experts with kinds of text: "
            "train moe-quickstart"
        )
    result = judge(routes, kinds, num_experts=num_experts, seed=args.seed)
    result["hints"] = agreement(args.model.parent / "tier_hints.json", routes, num_experts)
    print_result(result)
    emit_json({"model": str(args.model), **result}, args.json)
    return 0 if result["passed"] else 1


def route(model: "nn.Module", ids: Sequence[int]) -> Routes:
    """Return the experts that each token of a document is routed to, read in whole contexts."""
    import torch

    from lib.signals.router import routed_ids

    context = int(model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    seen: list[Any] = []

    def note(module: "nn.Module", args: Any, kwargs: Any) -> None:
        ids = routed_ids(args, kwargs)
        assert ids is not None
        seen.append(ids.cpu())

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in experts]
    pieces = []
    with torch.no_grad():
        for piece in torch.tensor(ids)[None].split(context, 1):
            seen.clear()
            model(input_ids=piece, use_cache=False)
            pieces.append(torch.stack(seen, 1).numpy())
    for hook in hooks:
        hook.remove()
    return np.concatenate(pieces)


def judge(
    routes: Sequence[Routes], kinds: Sequence[str], *, num_experts: int, seed: int
) -> dict[str, Any]:
    """Return what the documents' routes say, and which checks hold."""
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = np.stack([count_experts(each, num_experts) for each in routes])  # (docs, layers, E)
    names = sorted(set(kinds))
    labels = np.array([names.index(kind) for kind in kinds])
    information = mutual_information(counts, labels)
    shuffled = np.stack(
        [mutual_information(counts, generator.permutation(labels)) for _ in range(SHUFFLES)]
    )
    entropy = [_entropy(usage) / math.log(num_experts) for usage in counts.sum(0)]
    stream = np.concatenate(routes)
    num_all = stream.shape[1] * num_experts
    lru = {}
    for share in SHARES:
        capacity = round(share * num_all)
        hit = lru_hit_rate(stream, capacity)
        lru[str(share)] = {"slots": capacity, "hit": hit, "gain": hit - capacity / num_all}
    checks = {
        "information": bool((information > shuffled.max(0)).all()),
        "entropy": min(entropy) >= LEAST_ENTROPY,
        "lru": lru[str(JUDGED_SHARE)]["gain"] >= LEAST_GAIN,
    }
    return {
        "documents": {name: kinds.count(name) for name in names},
        "tokens": len(stream),
        "experts": num_experts,
        "top_k": stream.shape[2],
        "layers": [
            {
                "information": float(information[layer]),
                "shuffled_mean": float(shuffled[:, layer].mean()),
                "shuffled_max": float(shuffled[:, layer].max()),
                "entropy": entropy[layer],
                "reuse_tokens_median": reuse_distance(stream[:, layer]),
            }
            for layer in range(stream.shape[1])
        ],
        "lru": lru,
        "checks": checks,
        "passed": all(checks.values()),
    }


def count_experts(routes: Routes, num_experts: int) -> NDArray[np.int64]:
    """Return (layers, E) counts of routes (tokens, layers, k)."""
    return np.stack(
        [np.bincount(layer.ravel(), minlength=num_experts) for layer in routes.swapaxes(0, 1)]
    )


def mutual_information(counts: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return 2 I(kind; expert) / (H(kind) + H(expert)) of each layer, in [0, 1], from counts
    (documents, layers, E) and each document's kind. Slots are what is drawn: a token has k.
    """
    joint = np.stack([counts[labels == kind].sum(0) for kind in range(labels.max() + 1)])
    result = []
    for table in joint.swapaxes(0, 1):  # (kinds, E)
        kind, expert = _entropy(table.sum(1)), _entropy(table.sum(0))
        result.append(2 * (kind + expert - _entropy(table.ravel())) / (kind + expert))
    return np.array(result)


def _entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy of frequencies, in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def lru_hit_rate(stream: Routes, capacity: int) -> float:
    """Return the share of asked-for experts that a cache of all layers' least lately used holds;
    a layer's k experts are asked for together, and compulsory misses count.
    """
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for token in stream.tolist():
        for layer, experts in enumerate(token):
            hits += sum((layer, expert) in cache for expert in experts)
            for expert in experts:
                cache[layer, expert] = None
                cache.move_to_end((layer, expert))
            while len(cache) > capacity:
                cache.popitem(last=False)
    return hits / stream.size


def reuse_distance(layer: Routes) -> float:
    """Return after how many tokens an expert of a layer (tokens, k) is used again, the median."""

    def distances() -> Iterator[int]:
        last: dict[int, int] = {}
        for position, experts in enumerate(layer.tolist()):
            for expert in experts:
                if expert in last:
                    yield position - last[expert]
                last[expert] = position

    return float(median(distances()))


def agreement(path: Path, routes: Sequence[Routes], num_experts: int) -> dict[str, Any] | None:
    """Return how the hints' counts from training rank experts, beside held-out usage: the rank
    correlation of each layer. None where there are no such hints.
    """
    from scipy.stats import spearmanr

    from lib.hints import load_hints

    if not path.exists():
        return None
    counted = [
        float(hint.signals["router_counts"])  # type: ignore[arg-type]
        for hint in load_hints(path).blocks.values()
        if "router_counts" in hint.signals
    ]
    heldout = count_experts(np.concatenate(routes), num_experts)
    if len(counted) != heldout.size:
        return None
    training = np.array(counted).reshape(heldout.shape)
    ranks = [float(spearmanr(a, b).statistic) for a, b in zip(training, heldout, strict=True)]
    return {"rank_correlation": ranks, "mean": mean(ranks)}


def print_result(result: dict[str, Any]) -> None:
    """Print the tables and what they come to, for people."""
    documents = ", ".join(f"{number} {kind}" for kind, number in result["documents"].items())
    print(f"{result['tokens']:,} held-out tokens of {documents} documents")
    print(f"{'layer':>5} {'information':>12} {'shuffled: mean':>15} {'max':>7} {'entropy':>8} "
          f"{'reuse (tokens)':>15}")  # fmt: skip
    for layer, row in enumerate(result["layers"]):
        print(f"{layer:>5} {row['information']:>12.4f} {row['shuffled_mean']:>15.4f} "
              f"{row['shuffled_max']:>7.4f} {row['entropy']:>8.3f} "
              f"{row['reuse_tokens_median']:>15.0f}")  # fmt: skip
    print(f"{'slots':>5} {'of all':>7} {'LRU hit':>8} {'above slots / experts':>22}")
    for share, row in result["lru"].items():
        print(f"{row['slots']:>5} {float(share):>7.0%} {row['hit']:>8.1%} {row['gain']:>+22.1%}")
    if result["hints"] is not None:
        print(f"rank correlation of router_counts with held-out use: {result['hints']['mean']:.2f}")
    for check, holds in result["checks"].items():
        print(f"{check}: {'holds' if holds else 'FAILS'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="checkpoint folder of the run"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="its configuration; default: beside the folder"
    )
    parser.add_argument(
        "--tokens", type=int, default=512, metavar="N", help="read of each document at most"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffled controls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
