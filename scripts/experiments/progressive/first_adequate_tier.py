"""The lowest tier of keys and values that is good enough, request by request.

    python scripts/experiments/progressive/first_adequate_tier.py \
        --recall-model runs/progressive-recall --model runs/demo/model \
        --json docs/results/progressive_tiers.json --picture docs/images/progressive_tiers.png

Of each request the model writes its greedy answer with a full cache. The same answer is then read
with the prompt's keys and values as each tier gives them back (first tokens and latest full, pages
between them by the codec), and KL(full || tier) is taken of each token. A tier is adequate where
their mean is within epsilon. The first token comes from the prefill, which is full: its KL is 0.

The small model (``workload.py``) answers all its kinds from easy to hard; the other one, a chat
model of the hub, is given the library's documents to go on with, to sum up, and to look up a line
that was planted in them. stdout ends with one JSON document.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.checkpoint.models import load_model, quiet_transformers
from lib.codecs.layout import Codec
from lib.commands.cli import emit_json, run_main
from lib.commands.flags import whole_number
from lib.files import check_writable
from lib.progressive.kv_cache import round_trip
from lib.progressive.ladder import (
    PAGE_TOKENS,
    SINK_TOKENS,
    KvShape,
    KvTier,
    LayerPrecisions,
    num_pages,
)
from lib.text.held_out import load_tokenizer
from lib.text.library import kind_texts
from lib.vocabulary import Precision
from scripts.experiments.progressive.workload import END, KINDS, load_or_train, make_requests

PAIRS: dict[str, LayerPrecisions | None] = {
    "K3V2": (Precision.INT3, Precision.INT2),
    "K4V4": (Precision.INT4, Precision.INT4),
    "K6V5": (Precision.INT6, Precision.INT5),
    "K8V8": (Precision.INT8, Precision.INT8),
    "full": None,
}
EPSILONS = (0.0003, 0.001, 0.003, 0.01, 0.02, 0.03, 0.1)
DIFFICULTIES = (0.0, 0.25, 0.5, 0.75, 1.0)
DOCUMENT_KINDS = ("continue", "sum up", "look up")
_NEW_TOKENS = 44
"""Of an answer, at most: the longest that the recall tasks expect is 43."""
_DOCUMENT_TOKENS = (160, 640)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A request's mean KL at each tier, nats per token."""

    kind: str
    difficulty: float | None
    prompt_tokens: int
    answer_tokens: int
    kl: dict[str, float]

    def first_within(self, epsilon: float) -> str:
        """Return the lowest tier that is adequate."""
        return next(tier for tier, kl in self.kl.items() if kl <= epsilon)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    check_writable(args.json)
    quiet_transformers(progress=False)
    document: dict[str, Any] = {"tiers": list(PAIRS), "epsilon": args.epsilon, "models": {}}
    recall, _ = load_or_train(args.recall_model)
    items = [
        item
        for kind in KINDS
        for difficulty in DIFFICULTIES
        for item in make_requests(kind, difficulty, args.requests, args.seed)
    ]
    found = [
        measure(recall, item.prompt, kind=item.kind, difficulty=item.difficulty, ends={END})
        for item in _progress(items)
    ]
    document["models"]["recall"] = summarize(recall, found)
    if args.model is not None:
        model = load_model(args.model)
        tokenizer = load_tokenizer(args.model)
        prompts = read_documents(tokenizer, args.documents, args.seed)
        ends = {tokenizer.eos_token_id}
        found = [
            measure(model, prompt, kind=kind, difficulty=None, ends=ends)
            for kind, prompt in _progress(prompts)
        ]
        document["models"]["documents"] = summarize(model, found)
    for name, figures in document["models"].items():
        print(f"{name}: {figures['requests']} requests; share whose first adequate tier it is")
        for epsilon, shares in figures["first_adequate"].items():
            cells = (f"{tier} {share:.2f}" for tier, share in shares["all"].items())
            print(f"  epsilon {epsilon:<8}" + "  ".join(cells))
    if args.picture is not None:
        draw(document, args.picture)
    emit_json(document, args.json)
    published = (each["first_adequate"][str(args.epsilon)] for each in document["models"].values())
    return int(any(max(shares["all"].values()) > 0.8 for shares in published))


@torch.inference_mode()
def measure(
    model: Any, prompt: list[int], *, kind: str, difficulty: float | None, ends: set[int]
) -> Measured:
    """Let the model answer, and read the answer at each tier."""
    tiers = make_tiers(model)
    output = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    states = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
    answer = [int(output.logits[0, -1].argmax())]
    cache = output.past_key_values
    while len(answer) < _NEW_TOKENS and answer[-1] not in ends:
        logits = model(
            input_ids=torch.tensor([answer[-1:]]), past_key_values=cache, use_cache=True
        ).logits
        answer.append(int(logits[0, -1].argmax()))
    kl_R = torch.zeros(len(tiers), dtype=torch.float64)
    if len(answer) > 1:
        ids_RT = torch.tensor([answer[:-1]]).expand(len(tiers), -1)
        cache = held_at(states, tiers, len(prompt))
        logits_RTV = model(input_ids=ids_RT, past_key_values=cache, use_cache=True).logits
        log_probs_RTV = logits_RTV.double().log_softmax(-1)
        full_TV = log_probs_RTV[-1]
        kl_R = (full_TV.exp() * (full_TV - log_probs_RTV)).sum((1, 2)).clamp(min=0) / len(answer)
    return Measured(
        kind=kind,
        difficulty=difficulty,
        prompt_tokens=len(prompt),
        answer_tokens=len(answer),
        kl={tier.name: float(kl) for tier, kl in zip(tiers, kl_R, strict=True)},
    )


def make_tiers(model: Any) -> list[KvTier]:
    """Return the ladder, all layers alike."""
    layers = model.config.num_hidden_layers
    return [
        KvTier(name=name, precisions=None if pair is None else (pair,) * layers)
        for name, pair in PAIRS.items()
    ]


def held_at(states: list[tuple[Tensor, Tensor]], tiers: list[KvTier], tokens: int) -> Any:
    """Return a cache with a row for each tier: the prompt's states as it gives them back."""
    from transformers import DynamicCache

    pages = slice(SINK_TOKENS, SINK_TOKENS + num_pages(tokens) * PAGE_TOKENS)
    cache = DynamicCache()
    for number, pair in enumerate(states):
        rows: list[list[Tensor]] = [[], []]
        for tier in tiers:
            for side, part in enumerate(pair):
                held = part[:, :, :tokens].clone()
                if tier.precisions is not None and pages.stop > pages.start:
                    codec = Codec(tier.precisions[number][side])
                    held[:, :, pages] = round_trip(held[:, :, pages], codec)
                rows[side].append(held)
        cache.update(torch.cat(rows[0]), torch.cat(rows[1]), number)
    return cache


def read_documents(tokenizer: Any, count: int, seed: int) -> list[tuple[str, list[int]]]:
    """Return kinds and prompts, of different documents of the library."""
    draw = random.Random(seed)
    texts = [text for _, text in kind_texts("prose", max_bytes=4 << 20) if len(text) > 4000]
    prompts = []
    for number, text in enumerate(draw.sample(texts, count)):
        kind = DOCUMENT_KINDS[number % len(DOCUMENT_KINDS)]
        tokens = draw.randint(*_DOCUMENT_TOKENS)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
        if kind == "continue":
            prompts.append((kind, list(ids)))
            continue
        lines = tokenizer.decode(ids).split("\n")
        asked = "Sum up this document in one sentence."
        if kind == "look up":
            names = draw.sample(("apple", "bridge", "candle", "desert", "engine", "forest"), 4)
            for name in names:
                line = f"{name}={draw.randrange(10_000, 100_000)}"
                lines.insert(draw.randrange(len(lines) + 1), line)
            asked = f"What are {names[0]} and {names[1]} in this document?"
        text = "\n".join(lines)
        chat = [{"role": "user", "content": f"{text}\n\n{asked}"}]
        encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        prompts.append((kind, list(encoded["input_ids"])))
    return prompts


def summarize(model: Any, found: Sequence[Measured]) -> dict[str, Any]:
    """Return how requests spread over the tiers at each epsilon, all and by kind and difficulty."""
    groups: dict[str, list[Measured]] = {"all": list(found)}
    for each in found:
        groups.setdefault(each.kind, []).append(each)
        if each.difficulty is not None:
            groups.setdefault(f"difficulty {each.difficulty}", []).append(each)
    config = model.config
    tiers = make_tiers(model)
    shape = KvShape(
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        key_dim=config.head_dim,
        value_dim=config.head_dim,
        itemsize=model.dtype.itemsize,
    )
    tokens = round(sum(each.prompt_tokens for each in found) / len(found))
    full = tiers[-1].num_bytes(shape, tokens)
    return {
        "requests": len(found),
        "prompt_tokens": [min(each.prompt_tokens for each in found),
                          max(each.prompt_tokens for each in found)],
        "answer_tokens": [min(each.answer_tokens for each in found),
                          max(each.answer_tokens for each in found)],
        "bytes_over_full": {tier.name: tier.num_bytes(shape, tokens) / full for tier in tiers},
        "median_kl": {tier.name: median(each.kl[tier.name] for each in found) for tier in tiers},
        "first_adequate": {
            str(epsilon): {
                name: _shares([each.first_within(epsilon) for each in group])
                for name, group in groups.items()
            }
            for epsilon in EPSILONS
        },
    }  # fmt: skip


def _shares(tiers: Sequence[str]) -> dict[str, float]:
    counts = Counter(tiers)
    return {tier: counts[tier] / len(tiers) for tier in PAIRS}


def draw(document: dict[str, Any], path: Path) -> None:
    """Draw the histogram at the published epsilon: one panel a model, kinds stacked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"recall": "small model, recall tasks", "documents": "chat model, documents"}
    models = document["models"]
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(5 * len(models), 3.6), sharey=True, squeeze=False
    )
    for axis, (name, figures) in zip(axes[0], models.items(), strict=True):
        groups = figures["first_adequate"][str(document["epsilon"])]
        kinds = [kind for kind in groups if kind != "all" and not kind.startswith("difficulty")]
        bottom = [0.0] * len(PAIRS)
        for kind in kinds:
            heights = [groups[kind][tier] / len(kinds) for tier in PAIRS]
            axis.bar(list(PAIRS), heights, bottom=bottom, label=kind, width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for place, total in enumerate(bottom):
            axis.text(place, total + 0.01, f"{total:.0%}", ha="center", fontsize=10)
        axis.set_title(f"{titles[name]} ({figures['requests']} requests)", fontsize=11)
        axis.set_xlabel("first adequate tier")
        axis.legend(fontsize=9, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"share of requests, ε = {document['epsilon']} nats/token")
    axes[0][0].set_ylim(0, 0.9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def _progress(items: Sequence[Any]) -> Any:
    from tqdm import tqdm

    return tqdm(items, unit="request", mininterval=10)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Find each request's first adequate tier.",
        epilog="Exit codes: 0 no tier has more than 80 % of the requests, 1 one has.",
    )
    default = "(default: %(default)s)"
    parser.add_argument(
        "--recall-model",
        type=Path,
        default=Path("runs/progressive-recall"),
        metavar="DIR",
        help=f"trained where there is none {default}",
    )
    parser.add_argument("--model", metavar="DIR", help="a chat model, for documents")
    parser.add_argument(
        "--requests",
        type=whole_number(1),
        default=12,
        metavar="N",
        help=f"of each kind and difficulty {default}",
    )
    parser.add_argument("--documents", type=whole_number(1), default=24, metavar="N", help=default)
    parser.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help=default)
    parser.add_argument(
        "--epsilon",
        type=float,
        choices=EPSILONS,
        default=0.01,
        help=f"that the picture has {default}",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the histogram here")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
