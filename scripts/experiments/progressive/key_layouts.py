"""What a page of keys costs in quality with a scale for each token, and for each number of a head.

    python scripts/experiments/progressive/key_layouts.py --model DIR --json key_layouts.json

Keys of SINK_TOKENS to the end of whole pages are encoded one way and the other, at the same bytes
where heads have 64 numbers; values stay full. KL is of the tokens that follow, against full keys,
in nats per token. docs/progressive.md has the table.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import Parser, add_json_flag, emit, run_main
from lib.kconfig import ROOT
from lib.progressive.ladder import PAGE_TOKENS, SINK_TOKENS
from lib.vocabulary import Precision

PRECISIONS = [Precision.INT8, Precision.INT6, Precision.INT5]
PRECISIONS += [Precision.INT4, Precision.INT3, Precision.INT2]
PAGES, FOLLOWING = 8, 64
TEXTS = ("docs/concepts.md", "docs/planner.md", "docs/training.md")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("Compare a scale for each token of keys with one for each number of a head.")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint")
    add_json_flag(parser)
    args = parser.parse_args(argv)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    sums: dict[tuple[Precision, str], list[float]] = {}
    with torch.inference_mode():
        for text in TEXTS:
            ids = tokenizer((ROOT / text).read_text(), return_tensors="pt").input_ids
            for key, (error, kl) in compare(model, ids).items():
                found = sums.setdefault(key, [0.0, 0.0])
                found[0] += error
                found[1] += kl / len(TEXTS)
    rows = [
        {"precision": str(precision), "scale_for": way, "squared_error": error, "kl_nats": kl}
        for (precision, way), (error, kl) in sums.items()
    ]
    lines = ["precision  a scale for each  squared error  KL"]
    lines += [
        f"{row['precision']:<9}  {row['scale_for']:<16}  {row['squared_error']:13.4g}"
        f"  {row['kl_nats']:.2g}"
        for row in rows
    ]
    document = {"texts": TEXTS, "pages": PAGES, "following_tokens": FOLLOWING, "rows": rows}
    emit("\n".join(lines), document, args.json)
    return 0


def compare(model: Any, ids: Any) -> dict[tuple[Precision, str], tuple[float, float]]:
    """Return squared error and KL by precision and way, for one text's token ids (1, T)."""
    paged = SINK_TOKENS + PAGES * PAGE_TOKENS
    cache = model(ids[:, :paged], use_cache=True).past_key_values
    following = ids[:, paged : paged + FOLLOWING]
    full = model(following, past_key_values=copy.deepcopy(cache)).logits.log_softmax(-1)
    found = {}
    for precision in PRECISIONS:
        for way in ("token", "number"):
            error, changed = 0.0, copy.deepcopy(cache)
            for layer in changed.layers:
                keys = layer.keys[:, :, SINK_TOKENS:]
                decoded = round_trip(keys, precision, by_number=way == "number")
                error += float((decoded - keys).square().sum())
                keys.copy_(decoded)
            logits = model(following, past_key_values=changed).logits.log_softmax(-1)
            kl = (full.exp() * (full - logits)).sum(-1).mean()
            found[precision, way] = (error, float(kl))
    return found


def round_trip(keys: Any, precision: Precision, *, by_number: bool) -> Any:
    """Return keys (1, heads, T, dim) as their codes give them back."""
    from lib.codecs.records import Codec, decode, encode

    codec = Codec(precision)
    pages = keys.unflatten(2, (PAGES, PAGE_TOKENS))
    pages = pages.transpose(-1, -2) if by_number else pages
    rows = pages.reshape(-1, pages.shape[-1])
    decoded = decode(encode(rows, codec), codec.layout(*rows.shape)).view(pages.shape)
    return (decoded.transpose(-1, -2) if by_number else decoded).reshape(keys.shape)


if __name__ == "__main__":
    sys.exit(run_main(main))
