"""The commands behind a run, from what its documents say was run."""

from itertools import chain

from .run import Run

_BENCHMARK_SETTINGS = (
    *("model", "checkpoint", "tier_hints", "budget", "precision", "epsilon", "mode", "canary"),
    *("batch_size", "num_iterations", "warmup", "device", "dtype"),
)
"""What the command of a benchmark has of its document, under flags of the same names."""


def run_commands(run: Run) -> list[list[str]]:
    """Return the commands that make a run again, word by word."""
    folder = run.directory
    commands = []
    if run.config:
        commands.append(["python", "-m", "gpt2.train", "--config", str(folder / ".config")])
    for document in run.benchmarks:
        length = document["seq_length"]
        flags = {
            **{f"--{name.replace('_', '-')}": document.get(name) for name in _BENCHMARK_SETTINGS},
            "--spec": document["spec_file"],
            "--sequence-length": length,
            "--samples": document["perplexity_tokens"] // (length - 1),
            "--json": folder / f"benchmark_{document['mode']}.json",
        }
        words = [[flag, str(value)] for flag, value in flags.items() if value is not None]
        words += [["--exact"]] if document.get("exact") else []
        commands.append(["tierhints", "benchmark", *chain.from_iterable(words)])
    commands.append(["tierhints", "report", str(folder)])
    return commands
