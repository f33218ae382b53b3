"""``tierhints <verb>``: one command for every verb, each in a file of its own."""

import importlib
import os
import sys
from collections.abc import Sequence

from .cli import run_main

# Idle threads of libgomp spin by default, and halt a computation when another process wants their
# core. It is read when torch is imported, which verbs do.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

VERBS = {
    "collect": "measure the Fisher information of a model on a text, and write its hints",
    "from-checkpoint": "make hints of a training checkpoint, from its optimizer's state",
    "calibrate": "predict and measure what each precision costs each block, into the hints",
    "generate": "answer a prompt with a model held within a memory budget",
    "serve": "serve a model over HTTP, each request at the quality that it asks for",
    "calibrate-requests": "measure what compact keys and values cost requests, for their bounds",
    "plan": "say where weights would go within a budget, and how fast that would be",
    "what-if": "ask what a faster link or more memory would bring",
    "evaluate": "measure perplexity and KL of a model under a plan",
    "benchmark": "time forward passes under a plan, against the untouched model",
    "acceptance": "measure how often a model would have chosen its compressed copy's token",
    "frontier": "measure fast memory against tokens per second against KL",
    "export": "write hints in the format of another tool",
    "probe": "measure the memory tiers of this machine",
    "monitor": "watch a running model from another terminal, and ask for another budget",
    "replay": "decide again what a controller's log says, or what would have happened instead",
    "rank-layers": "rank a model's layers by what their KV cache is worth",
    "trace": "record which experts a mixture routes to while it answers",
    "judge-policies": "judge policies of expert residency on a recording of routing",
    "doctor": "say what this machine has, and what works on it",
    "report": "draw the plots of a run, and one HTML page",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first argument names; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else "--help"
    if verb in ("-h", "--help"):
        return run_main(lambda: print(_usage(), flush=True))
    if verb not in VERBS:
        print(
            f"error: no verb {verb!r}; there are: {', '.join(VERBS)} (tierhints --help)",
            file=sys.stderr,
        )
        return 2
    sys.argv[0] = f"tierhints {verb}"  # what argparse calls the program
    return run_main(lambda: _run(verb, arguments[1:]))


def _run(verb: str, arguments: Sequence[str]) -> int:
    """Import a verb, which takes a second, and run it: Ctrl-C may come at any time."""
    command = importlib.import_module(f"{__package__}.{verb.replace('-', '_')}")
    code: int = command.main(arguments)
    return code


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        ["usage: tierhints <verb> ...", "", *lines, "", "tierhints <verb> --help has its flags."]
    )


if __name__ == "__main__":
    sys.exit(main())
