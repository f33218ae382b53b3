"""Train GPT-2 as ``.config`` says and write its hints: ``python -m gpt2.train``, or with several
processes ``torchrun --nproc-per-node N -m gpt2.train``.

A run that was stopped continues where it was; a finished one is left as it is, but for hints whose
settings changed.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.commands.cli import emit_json, run_main
from lib.config import Config, TrainConfig, load_config
from lib.errors import InputError

from .checkpoint import TrainerState, load_state, recover_checkpoint
from .data import prepare_data
from .distributed import World, is_main, log, start_world, stop_world
from .hints import write_hints
from .rundir import RunDirectory
from .trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, and print the result."""
    parser = argparse.ArgumentParser(
        prog="python -m gpt2.train",
        description="Train GPT-2 as a .config says, and write its tier_hints.json. "
        "A run that was stopped continues.",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=Path(".config"),
        help="configuration file (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    result = train(load_config(options.config), options.config)
    if is_main():
        print_summary(result)
        emit_json(result)
    return 0


def train(config: Config, config_path: Path) -> dict[str, Any]:
    """Train, or continue, or find finished, the run of a configuration; returns the summary of
    where it stands.

    Raises InputError for bad input, FloatingPointError when the loss diverges, OSError when results
    can't be written.
    """
    world = start_world(config.run.device)
    run = RunDirectory(config)
    try:
        check_sizes(config.train, world)
        if is_main():
            run.open()
            recover_checkpoint(run.checkpoint)
            if config.tiering.generate_json:
                run.check_hints_path()
        world.wait()
        state = load_state(run.checkpoint)
        if state is not None:
            run.check_same_training()
        if (
            state is not None
            and state.complete
            and (not config.tiering.generate_json or run.hints_are_current())
        ):
            log(f"{run.path} is finished ({state.step} steps): nothing to train")
            if is_main():
                run.write_config(config_path)
            return summarize(run, state)
        corpus = prepare_data(config.data, config.model)
        if state is not None and state.corpus_digest != corpus.digest:
            raise InputError(
                f"{run.path} was trained on another text of {corpus.name} (digest "
                f"{state.corpus_digest}, now {corpus.digest}): choose another RUN_NAME, or delete "
                f"{run.path}"
            )
        trainer = Trainer(config, world, corpus, run, state)
        world.wait()  # all ranks have read what the main one now overwrites
        finished = state is not None and state.complete
        if not finished:
            if is_main():
                if state is None:
                    run.discard_results()
                run.write_config(config_path)
                run.write_versions()
            state = trainer.run()
            if is_main():
                from lib.report.plots import plot_loss

                plot_loss(run.metrics_path, run.loss_plot, corpus.unigram_entropy)
        assert state is not None
        if state.complete and config.tiering.generate_json:
            write_hints(
                config,
                run,
                world=world,
                network=trainer.network,
                optimizer=trainer.optimizer,
                scale=trainer.scale,
                router_counts=trainer.state.router_counts,
                corpus=corpus,
            )
        if finished and is_main():
            # Only now: config.json tells what the hints beside it were asked for.
            run.write_config(config_path)
        if not state.complete:
            start = "python" if world.size == 1 else f"torchrun --nproc-per-node {world.size}"
            log(
                f"stopped after step {state.step} of {config.train.steps} and saved "
                f"{run.checkpoint}; continue with: {start} -m gpt2.train --config {config_path}"
            )
        return summarize(run, state)
    finally:
        run.close()
        stop_world()


def check_sizes(config: TrainConfig, world: World) -> None:
    """Refuse a batch that can't be cut evenly over the processes."""
    if config.batch_size % world.size:
        raise InputError(
            f"TRAIN_BATCH_SIZE={config.batch_size} is not a multiple of the {world.size} processes "
            "that share it: change one"
        )


def summarize(run: RunDirectory, state: TrainerState) -> dict[str, Any]:
    """Return the JSON document of where a run stands."""
    loss = state.heldout_loss
    return {
        "run": str(run.path),
        "checkpoint": str(run.checkpoint),
        "hints": str(run.hints) if run.hints.exists() else None,
        "complete": state.complete,
        "step": state.step,
        "tokens": state.tokens,
        "train_loss_nats": state.train_loss,
        "heldout_loss_nats": loss,
        "heldout_perplexity": None if loss is None else math.exp(loss),
        "unigram_entropy_nats": state.unigram_entropy,
        "tokens_per_s": state.tokens / state.train_seconds,
        "train_seconds": state.train_seconds,
    }


def print_summary(result: dict[str, Any]) -> None:
    """Print the end of a training run for a person."""
    loss = result["heldout_loss_nats"]
    lines = [
        (
            "steps",
            f"{result['step']} ({result['tokens']:,} tokens, {result['tokens_per_s']:,.0f} "
            "tokens/s)",
        ),
        ("training loss", f"{result['train_loss_nats']:.3f} nats/token (last step)"),
    ]
    if loss is not None:
        lines += [
            ("held-out loss", f"{loss:.3f} nats/token (perplexity {math.exp(loss):.1f})"),
            (
                "unigram entropy",
                f"{result['unigram_entropy_nats']:.3f} nats/token (what a model without context "
                "reaches)",
            ),
        ]
    lines += [("checkpoint", result["checkpoint"])]
    if result["hints"]:
        lines += [("hints", result["hints"])]
    for name, text in lines:
        print(f"{name:<16} {text}")


if __name__ == "__main__":
    sys.exit(run_main(main))
