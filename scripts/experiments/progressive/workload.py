"""Requests whose difficulty has a real spread, and small models that can answer them.

    python scripts/experiments/progressive/workload.py --output runs/progressive-recall

A document is filler with *pairs* planted in it: a name of two tokens, then its value of one or
eight. At its end some names are asked for, and the answer is each name with its value:

    filler .. a b v v .. filler .. a b v v ..  QUERY a b a b ANSWER  a b v v a b v v END

What makes it hard: more pairs, a larger distance, names that share a half (similarity), more names
asked for, longer values. Kinds (MQAR: Arora et al. 2023, arXiv:2312.04927):

- ``recall``: little filler, pairs one after another; few are asked for
- ``queries``: the same, and many are asked for
- ``needle``: one pair is asked for, the others are distractors that share a half of its name
- ``text``: the filler is a text's bytes
- ``continue``: a text's bytes alone, to be gone on with; not in ``KINDS``, since the model of this
  module isn't trained for it

The model is a Llama of a million weights (4 layers of 128, 4 query and 2 KV heads of 64), trained
on these documents: short ones first, else recall isn't learnt in this time.
"""

import argparse
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.text.library import kind_texts

BYTES = 256
"""Tokens 0 to 255 are a text's bytes."""
HALVES = 32
FIRST, SECOND = range(256, 256 + HALVES), range(288, 288 + HALVES)
VALUES, NOISE = range(320, 384), range(384, 416)
QUERY, ANSWER, END, PAD = range(416, 420)
VOCABULARY = 420
CONTEXT = 1024
CONTINUED = 32
"""Tokens of an answer of the kind ``continue``."""
_IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """What makes a document hard."""

    tokens: int
    """Of the prompt, about; pairs come first, filler takes what is left."""
    pairs: int
    similarity: float
    """Share of the pairs whose name shares its first half with one that is asked for."""
    queries: int
    value_tokens: int = 1
    filler: str = "noise"
    """noise or text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A request, and what answers it."""

    prompt: list[int]
    answer: list[int]
    """Expected; of a continued text what stands there."""
    kind: str
    difficulty: float


KINDS = ("recall", "queries", "needle", "text")


def dials(kind: str, difficulty: float, draw: random.Random) -> Dials:
    """Set the dials for a kind of document at a difficulty from 0 to 1."""

    def between(easy: float, hard: float) -> int:
        return round(easy + (hard - easy) * difficulty)

    tokens = between(240, 640) + draw.randrange(64)
    if kind == "recall":
        return Dials(tokens=tokens, pairs=between(4, 128), similarity=0.5 * difficulty, queries=4)
    if kind == "queries":
        return Dials(
            tokens=tokens,
            pairs=between(8, 96),
            similarity=0.5 * difficulty,
            queries=between(4, 14),
        )
    if kind == "needle":
        return Dials(
            tokens=tokens,
            pairs=1 + between(2, 28),
            similarity=difficulty,
            queries=1,
            value_tokens=8,
        )
    if kind == "text":
        return Dials(
            tokens=tokens,
            pairs=between(3, 48),
            similarity=0.5 * difficulty,
            queries=between(3, 8),
            filler="text",
        )
    return Dials(tokens=tokens, pairs=0, similarity=0, queries=0, filler="text")


@cache
def _text(heldout: bool) -> bytes:
    """Return library text: what models are trained on, or other documents."""
    texts = [text for _, text in kind_texts("prose", max_bytes=3 << 20)]
    cut = len(texts) // 10
    return "\n".join(texts[:cut] if heldout else texts[cut:]).encode()


def make_document(
    setting: Dials, draw: random.Random, *, heldout: bool = False
) -> tuple[list[int], list[int]]:
    """Return prompt and answer."""
    if not setting.pairs:
        part = _cut(setting.tokens + CONTINUED, draw, heldout)
        return part[: setting.tokens], part[setting.tokens :]
    names = _names(setting, draw)
    asked = names[: setting.queries]
    values = {name: draw.choices(VALUES, k=setting.value_tokens) for name in names}
    draw.shuffle(names)
    planted = [[*name, *values[name]] for name in names]
    around = setting.tokens - sum(map(len, planted)) - 2 - 2 * len(asked)
    prompt = _scatter(planted, max(0, around), setting.filler, draw, heldout)
    draw.shuffle(asked)
    query = [half for name in asked for half in name]
    answer = [token for name in asked for token in (*name, *values[name])]
    return [*prompt, QUERY, *query, ANSWER], [*answer, END]


def _names(setting: Dials, draw: random.Random) -> list[tuple[int, int]]:
    """Draw different names, first those that are asked for."""
    asked = list(zip(draw.sample(FIRST, setting.queries), draw.choices(SECOND, k=setting.queries),
                     strict=True))  # fmt: skip
    names = dict.fromkeys(asked)
    while len(names) < setting.pairs:
        similar = draw.random() < setting.similarity
        first = draw.choice(asked)[0] if similar else draw.choice(FIRST)
        names[first, draw.choice(SECOND)] = None
    return list(names)


def _scatter(
    planted: list[list[int]], around: int, filler: str, draw: random.Random, heldout: bool
) -> list[int]:
    """Put filler between what is planted, at random places."""
    rest = _cut(around, draw, heldout) if filler == "text" else draw.choices(NOISE, k=around)
    places = sorted(draw.randrange(around + 1) for _ in planted)
    tokens: list[int] = []
    for start, end, pair in zip([0, *places], places, planted, strict=False):
        tokens += rest[start:end] + pair
    return tokens + rest[places[-1] :]


def _cut(tokens: int, draw: random.Random, heldout: bool) -> list[int]:
    text = _text(heldout)
    start = draw.randrange(len(text) - tokens)
    return list(text[start : start + tokens])


def make_requests(kind: str, difficulty: float, n: int, seed: int) -> list[Item]:
    """Make requests of a kind at a difficulty from 0 to 1, of documents that training never has:
    prompts of 240 to 704 tokens, answers of 11 to 43.
    """
    draw = random.Random(f"{kind} {difficulty} {seed}")
    items = []
    for _ in range(n):
        prompt, answer = make_document(dials(kind, difficulty, draw), draw, heldout=True)
        items.append(Item(prompt=prompt, answer=answer, kind=kind, difficulty=difficulty))
    return items


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Steps of training on documents of a length."""

    steps: int
    """At most."""
    batch: int
    tokens: int
    """Of a document at most; 0: pairs alone."""
    pairs: int
    until: float = 1.0
    """Share of tokens that are right, over ten batches: then it has been learnt."""
    kinds: tuple[str, ...] = ("pairs",)
    leaps: bool = True
    """Positions leap."""


PHASES = (
    Phase(steps=800, batch=32, tokens=0, pairs=12, until=0.92, leaps=False),
    Phase(steps=400, batch=16, tokens=192, pairs=32, until=0.85, kinds=("pairs", "needle", "text")),
    Phase(steps=90, batch=8, tokens=704, pairs=110, kinds=("pairs", "needle", "text", "continue")),
)
"""The rate falls in the last of them."""


def training_document(phase: Phase, draw: random.Random) -> tuple[list[int], int]:
    """Return a document's tokens, and from which on they are learnt."""
    kind = draw.choice(phase.kinds)
    tokens = round(phase.tokens * draw.uniform(0.2, 1))
    value_tokens = 8 if kind == "needle" else 1
    fitting = CONTEXT * 2 // 3 // (2 + value_tokens)  # with their answer, and room to leap
    most = min(phase.pairs, fitting, max(8, tokens // 4) if tokens else phase.pairs)
    pairs = draw.randint(most // 4, most)
    setting = Dials(
        tokens=tokens,
        pairs=pairs,
        similarity=draw.choice((0, 0, 0.3, 0.6)) if kind != "needle" else draw.random(),
        queries=min(pairs, 16) if kind != "needle" else 1,
        value_tokens=value_tokens,
        filler="text" if kind == "text" else "noise",
    )
    prompt, answer = make_document(setting, draw)
    return prompt + answer, len(prompt)


def stretch(tokens: Sequence[int], draw: random.Random) -> list[int]:
    """Return positions that leap before some of the pairs, as if there were filler: so distances
    are learnt that would take long documents. A third of the documents have none.
    """
    starts = [place for place, token in enumerate(tokens) if token in FIRST or token == QUERY]
    if QUERY in tokens:
        starts = starts[: starts.index(tokens.index(QUERY)) + 1]
    leaps = [0] * len(tokens)
    if starts and draw.random() < 2 / 3:
        chosen = draw.sample(starts, min(len(starts), draw.randint(1, 6)))
        room = draw.randrange(1, CONTEXT - len(tokens))
        for place in chosen:
            leaps[place] = room // len(chosen)
    return [place + leap for place, leap in enumerate(itertools.accumulate(leaps))]


def batches(phase: Phase, draw: random.Random) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield tokens (B, T), padded on the right, their positions, and what is to be predicted."""
    for _ in range(phase.steps):
        documents = [training_document(phase, draw) for _ in range(phase.batch)]
        longest = max(len(tokens) for tokens, _ in documents)
        ids_BT = torch.full((phase.batch, longest), PAD)
        places_BT = torch.zeros(phase.batch, longest, dtype=torch.int64)
        targets_BT = torch.full((phase.batch, longest), _IGNORED)
        for row, (tokens, start) in enumerate(documents):
            ids_BT[row, : len(tokens)] = torch.tensor(tokens)
            places = stretch(tokens, draw) if phase.leaps else range(len(tokens))
            places_BT[row, : len(tokens)] = torch.tensor(places)
            targets_BT[row, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
        yield ids_BT, places_BT, targets_BT


def make_model(seed: int) -> Any:
    """Return an untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def train(model: Any, phases: Sequence[Phase] = PHASES, *, seed: int) -> None:
    """Train a model, in a quarter of an hour of one core."""
    matrices = [each for each in model.model.layers.parameters() if each.dim() == 2]
    known = set(map(id, matrices))
    others = [each for each in model.parameters() if id(each) not in known]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [group["lr"] for each in optimizers for group in each.param_groups]
    draw = random.Random(seed)
    step, begin = 0, time.perf_counter()
    model.train()
    for number, phase in enumerate(phases, start=1):
        shares: deque[float] = deque(maxlen=10)
        for ids_BT, places_BT, targets_BT in batches(phase, draw):
            for each, rate in zip(optimizers, rates, strict=True):
                each.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
            learnt = targets_BT != _IGNORED
            states_BTC = model.model(input_ids=ids_BT, position_ids=places_BT).last_hidden_state
            logits = model.lm_head(states_BTC[learnt])
            loss = F.cross_entropy(logits, targets_BT[learnt])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for each in optimizers:
                each.step()
                each.zero_grad(set_to_none=True)
            step += 1
            shares.append(float((logits.argmax(-1) == targets_BT[learnt]).float().mean()))
            if step % 25 == 0:
                print(
                    f"phase {number}, step {step}: loss {loss:.3f}, right {shares[-1]:.3f}, "
                    f"{time.perf_counter() - begin:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            if len(shares) == 10 and mean(shares) >= phase.until:
                break


def load_or_train(folder: str | Path, *, seed: int = 0) -> tuple[Any, None]:
    """Return the model of a folder, which is trained and saved first where there is none; there is
    no tokenizer, since requests are token ids.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    if not (folder / "config.json").exists():
        model = make_model(seed)
        train(model, seed=seed)
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), None


@torch.inference_mode()
def measure_accuracy(model: Any, items: Sequence[Item]) -> float:
    """Return the share of answer tokens that are the most likely, after the right ones."""
    right = total = 0
    for item in items:
        ids_1T = torch.tensor([item.prompt + item.answer])
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, len(item.prompt) - 1 : -1]
        right += int((logits_TV.argmax(-1) == torch.tensor(item.answer)).sum())
        total += len(item.answer)
    return right / total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a model that recalls, and say how well.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    model, _ = load_or_train(args.output, seed=args.seed)
    accuracy = {
        f"{kind}_{difficulty}": measure_accuracy(model, make_requests(kind, difficulty, 8, 1))
        for kind in KINDS
        for difficulty in (0.0, 0.5, 1.0)
    }
    for name, share in accuracy.items():
        print(f"{name:<16}{share:.3f}")
    emit_json({"parameters": model.num_parameters(), "accuracy": accuracy}, None)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
