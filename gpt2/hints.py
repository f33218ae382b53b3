"""From a finished training run to its tier_hints.json: which signal is collected, on what text,
with what provenance.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lib.blocks import parameter_digest
from lib.config import Config
from lib.hints import Hints, save_hints
from lib.progress import progress_bar
from lib.signals import (
    MomentScale,
    adam_hints,
    attention_fim_trace,
    fisher_hints,
    measure_fisher,
    router_signals,
    save_fisher_diagonal,
)

from .data import Corpus, sample_windows
from .distributed import World, is_main, log
from .model import load_model
from .rundir import RunDirectory

_MEASURE_BATCH = 4
"""Sequences per backward pass: few, because each pass is one draw of the sampled labels."""
_MEASURE_STEP = 0
"""Training draws its windows for the steps 1, 2, ...; step 0 gives training text for
measurements.
"""


def write_hints(
    config: Config,
    run: RunDirectory,
    *,
    world: World,
    network: Any,
    optimizer: Optimizer,
    scale: MomentScale,
    router_counts: Mapping[str, int],
    corpus: Corpus,
) -> None:
    """Collect the configured signal and write the hints; every rank must call it, the main one
    measures and writes.

    ``router_counts``, block -> count, go into the hints of experts. Adam's moments are read from
    the optimizer, sharded or not. Fisher information and attention are measured on a copy of the
    network loaded from the checkpoint, whole and in float32, on training text.
    """
    tiering = config.tiering
    step = scale.steps
    common: dict[str, Any] = {
        "model_id": config.run.name,
        "revision": f"step-{step}",
        "hbm_threshold": tiering.hbm_threshold,
        "cpu_threshold": tiering.cpu_threshold,
        "extra_provenance": {"corpus": corpus.name, "corpus_digest": corpus.digest},
        "extra_signals": router_signals(router_counts),
    }
    if config.model.moe is not None:
        common["extra_provenance"] |= {
            "router_counts": "while training",
            "router_auxiliary_loss": config.model.moe.balance,
        }
    # Loaded only where something is measured on it; moments need no copy.
    measured = is_main() and (tiering.signal != "adam_state" or tiering.attention_sequences > 0)
    copy = load_model(run.checkpoint, dropout=0.0).to(world.device) if measured else None
    if copy is not None and tiering.attention_sequences:
        log(f"measuring attention on {tiering.attention_sequences} sequences")
        batches = _batches(corpus, config, tiering.attention_sequences)
        common["extra_signals"] |= {
            block: {"attention_fim_trace": heads}
            for block, heads in attention_fim_trace(copy, batches).items()
        }
    hints: Hints | None
    if tiering.signal == "adam_state":
        tokens_per_update, mean_clip_sq = scale.values(step) or (None, None)
        hints = adam_hints(
            optimizer,
            network,
            tokens_per_update=tokens_per_update,
            clip=config.train.clip,
            mean_clip_sq=mean_clip_sq,
            accumulation=config.train.accumulation,
            world_size=world.size,
            global_step=step,
            **common,
        )
    else:
        hints = None if copy is None else _fisher_hints(config, run, copy, corpus, common)
    if is_main() and hints is not None:
        if tiering.signal != "fim_diag":
            run.fisher_diagonal.unlink(missing_ok=True)  # of hints that these replace
        save_hints(hints, run.hints)
        log(f"wrote {run.hints}: {len(hints.blocks)} blocks by {hints.provenance['signal']}")


def _fisher_hints(
    config: Config, run: RunDirectory, copy: Any, corpus: Corpus, common: dict[str, Any]
) -> Hints:
    tiering = config.tiering
    log(f"measuring Fisher information on {tiering.fisher_sequences} sequences")
    with progress_bar(tiering.fisher_sequences, "Fisher information", unit="sequence") as bar:
        result = measure_fisher(
            copy,
            _batches(corpus, config, tiering.fisher_sequences),
            labels=tiering.fisher_labels,
            keep_diagonal=tiering.signal == "fim_diag",
            seed=config.run.seed,
            progress=bar.update,
        )
    if result.diagonal is not None:
        save_fisher_diagonal(result, run.fisher_diagonal, parameter_digest=parameter_digest(copy))
    return fisher_hints(result, copy, **common)


def _batches(corpus: Corpus, config: Config, num_sequences: int) -> tuple[Tensor, ...]:
    """Return windows of training text as token ids (B, context), drawn apart from the steps'."""
    windows = sample_windows(
        corpus.train,
        seed=config.run.seed,
        step=_MEASURE_STEP,
        num_windows=num_sequences,
        length=config.model.context,
    )
    return torch.from_numpy(windows).split(_MEASURE_BATCH)
