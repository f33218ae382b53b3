"""Record which experts a mixture routes to while it answers prompts.

    tierhints trace --model ./my-mixture --data ./my-text --output trace.csv.gz

Each prompt, a piece of the text, is answered by itself, sampled at temperature 1. The recording is
a route_trace v1, which judge-policies reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .cli import Parser, add_json_flag, emit, output_file
from .flags import add_device_flag, add_model_flag, parse_device, whole_number
from .text_flags import add_text_flags, read_held_out

_PROMPT_TOKENS = 32


def main(argv: Sequence[str] | None = None) -> int:
    """Load, record, write and print; returns the exit code."""
    args = _parser().parse_args(argv)

    from ..checkpoint.models import load_model, quiet_transformers
    from ..evaluation.record_routing import expert_modules, record_routing
    from ..evaluation.route_traces import write_trace

    quiet_transformers(progress=sys.stderr.isatty())
    device = parse_device(args.device)
    model: Any = load_model(args.model)
    expert_modules(model)
    text = read_held_out(args, model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = text.tokens.shape[1]
    if context is not None and length + args.new_tokens > context:
        raise InputError(
            f"--new-tokens {args.new_tokens} behind {length} of the prompt pass the model's "
            f"context of {context}: give at most {context - length}"
        )
    name = Path(args.model).name
    trace = record_routing(
        model.to(device), text.tokens, new_tokens=args.new_tokens, seed=args.seed, name=name
    )
    write_trace(trace, args.output)
    document = {
        "model": args.model,
        "text": {"source": text.source, "prompts": len(text.tokens)},
        "output": str(args.output),
        "layers": len(trace.experts),
        "experts": trace.num_experts,
        "per_token": max(trace.per_token.values()),
        "decode_steps": trace.decode_steps,
    }
    emit(
        f"{len(text.tokens)} prompts of {length} tokens, {trace.decode_steps} decode steps, "
        f"{len(trace.experts)} layers of {max(trace.experts.values())} experts, "
        f"{document['per_token']} used: {args.output}",
        document,
        args.json,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__.split("\n\n")[0].strip())
    default = "(default: %(default)s)"
    add_model_flag(parser)
    add_device_flag(parser)
    add_text_flags(parser, samples=4, use=", each a prompt", length=_PROMPT_TOKENS)
    parser.add_argument(
        "--new-tokens",
        type=whole_number(1),
        default=64,
        metavar="N",
        help=f"decode steps after each prompt {default}",
    )
    parser.add_argument(
        "--output",
        type=output_file,
        default=Path("trace.csv.gz"),
        metavar="FILE",
        help=f"the recording, compressed if it ends in .gz {default}",
    )
    add_json_flag(parser)
    return parser
