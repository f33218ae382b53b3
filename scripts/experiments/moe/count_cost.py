"""Time a training step of a mixture of experts, and what counting its routers adds to it.

    python scripts/experiments/moe/count_cost.py --config .config

The hooks take microseconds and a step varies by more than that, so that they are not found by
comparing steps: the modules that are hooked are called with their own arguments and with forwards
that compute nothing, with hooks and without.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the checkout

from lib.commands.cli import emit_json, run_main
from lib.errors import InputError

REPEATS = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, time, print."""
    args = _parser().parse_args(argv)
    import torch

    from gpt2.model import make_network
    from lib.config import load_config
    from lib.signals import RouterCounter

    config = load_config(args.config)
    if config.model.moe is None:
        raise InputError(f"{args.config} trains a GPT-2, which has no experts: take moe-quickstart")
    torch.manual_seed(0)
    network: Any = make_network(config.model).train()
    ids = torch.randint(config.model.vocab_size, (config.train.batch_size, config.model.context))
    experts = [m for name, m in network.named_modules() if name.endswith(".experts")]
    seen: dict[Any, Any] = {}
    hooks = [m.register_forward_pre_hook(lambda m, a: seen.__setitem__(m, a)) for m in experts]
    step = seconds(lambda: network(input_ids=ids, labels=ids).loss.backward(), repeats=args.steps)
    for hook in hooks:
        hook.remove()

    def call_experts() -> None:
        for module in experts:
            module(*seen[module])

    for module in experts:
        module.forward = lambda hidden, *_: hidden
    with torch.no_grad():
        plain = seconds(call_experts, repeats=REPEATS)
        with RouterCounter(network, training=True):
            counted = seconds(call_experts, repeats=REPEATS)
    result = {
        "step_ms": step * 1e3,
        "counting_ms": (counted - plain) * 1e3,
        "share": (counted - plain) / step,
        "tokens": ids.numel(),
        "layers": len(experts),
    }
    print(
        f"forward and backward of {ids.numel()} tokens: {result['step_ms']:.0f} ms, of "
        f"{args.steps}; counting in {len(experts)} layers: {result['counting_ms']:.2f} ms "
        f"({result['share']:.2%}), of {REPEATS}; medians, measured"
    )
    emit_json(result)
    return 0


def seconds(function: Callable[[], object], *, repeats: int) -> float:
    """Return the median time of a call, after one that isn't timed."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return median(times)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config", type=Path, default=Path(".config"), metavar="FILE", help="configuration"
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps to time")
    return parser


if __name__ == "__main__":
    sys.exit(run_main(main))
