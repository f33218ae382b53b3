"""Answers over chunks of a document: how many of them each answer needs, under a bound.

    python scripts/experiments/progressive/retrieve_answers.py --model runs/progressive-recall \
        --json docs/results/retrieval.json

Requests of ``workload.py`` with names to look up; the document is cut into chunks, and a chunk is
as relevant as it holds tokens of the names that are asked for. Each answer is verified by the full
context. Beside the mean KL that is allowed stands what came out; ``equal`` is the share of answers
that are the full context's to the token. stdout ends with one JSON document.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.commands.flags import whole_number
from lib.files import check_writable
from lib.progressive.bounds import Metric, QualityBound
from lib.progressive.retrieval import SHARES, Context, RetrievedAnswer, answer
from scripts.experiments.progressive.workload import (
    ANSWER,
    END,
    QUERY,
    Item,
    load_or_train,
    make_requests,
)

KINDS = ("recall", "queries", "needle", "text")
DIFFICULTIES = (0.0, 0.5, 1.0)
BOUNDS = {
    "exact": QualityBound(metric=Metric.EXACT),
    **{str(epsilon): QualityBound(epsilon=epsilon) for epsilon in (0.001, 0.01, 0.1)},
}
_CHUNK_TOKENS = 32


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    model, _ = load_or_train(args.model)
    items = [
        item
        for kind in KINDS
        for difficulty in DIFFICULTIES
        for item in make_requests(kind, difficulty, args.requests, args.seed)
    ]
    contexts = [cut(item) for item in items]
    found = {
        name: [
            ask(model, context, item, bound) for context, item in zip(contexts, items, strict=True)
        ]
        for name, bound in BOUNDS.items()
    }
    document: dict[str, Any] = {
        "requests": len(items),
        "chunk_tokens": _CHUNK_TOKENS,
        "shares": list(SHARES),
        "bounds": {name: summarize(answers, found["exact"]) for name, answers in found.items()},
    }
    for name, figures in document["bounds"].items():
        cells = (f"{share} of the chunks {part:.2f}" for share, part in figures["ended_at"].items())
        print(
            f"bound {name:<6} {'  '.join(cells)}; context {figures['context']:.2f} of full, "
            f"largest mean KL {figures['largest_kl']:.4f}, equal {figures['equal']:.2f}"
        )
    emit_json(document, args.json)
    return 0


def cut(item: Item) -> Context:
    """Cut a request's document into chunks."""
    end = item.prompt.index(QUERY)
    body, question = item.prompt[:end], item.prompt[end:]
    asked = set(question[1 : question.index(ANSWER)])
    chunks = [body[start : start + _CHUNK_TOKENS] for start in range(0, end, _CHUNK_TOKENS)]
    relevance = [sum(token in asked for token in chunk) for chunk in chunks]
    return Context(chunks=chunks, relevance=relevance, question=question)


def ask(model: Any, context: Context, item: Item, bound: QualityBound) -> RetrievedAnswer:
    return answer(model, context, bound, max_new_tokens=len(item.answer), end_ids=frozenset({END}))


def summarize(
    answers: Sequence[RetrievedAnswer], exact: Sequence[RetrievedAnswer]
) -> dict[str, Any]:
    ended = Counter(each.share for each in answers)
    return {
        "ended_at": {str(share): ended[share] / len(answers) for share in SHARES},
        "context": mean(each.context_tokens / each.full_tokens for each in answers),
        "drafted_per_token": sum(each.drafted for each in answers)
        / sum(len(each.tokens) for each in answers),
        "mean_kl": mean(each.mean_kl for each in answers),
        "largest_kl": max(each.mean_kl for each in answers),
        "equal": mean(
            each.tokens == other.tokens for each, other in zip(answers, exact, strict=True)
        ),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Answer over as few chunks as the bound allows.")
    default = "(default: %(default)s)"
    parser.add_argument(
        "--model",
        type=Path,
        default=Path("runs/progressive-recall"),
        metavar="DIR",
        help=f"trained where there is none {default}",
    )
    parser.add_argument(
        "--requests",
        type=whole_number(1),
        default=8,
        metavar="N",
        help=f"of each kind and difficulty {default}",
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
