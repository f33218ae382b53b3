"""The runs that a comparison of pruning scores is made of: a dense one per seed, and its arms.

An arm is the dense run until its schedule starts, so it branches off from a checkpoint of that and
trains only the rest; it comes to the same weights as if it had trained from the start.
"""

import math
import multiprocessing
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.config import Config, load_config
from lib.files import write_json, write_text
from lib.kconfig import read_assignments

_DROPPED = ("TRAIN_PRUNE", "ENABLE_HIERARCHICAL_TIERING", "TIERING_", "HINTS_", "RUN_")
_KEPT_CHECKPOINTS = 10
"""Of each dense run: what an arm redoes at most is a tenth of the training."""
QUICK = {"TRAIN_STEPS": 60, "TRAIN_WARMUP_STEPS": 6, "TRAIN_EVAL_SEQUENCES": 32}
"""What a quick comparison changes: whether it works, no result."""


@dataclass(frozen=True, slots=True)
class Arm:
    """What one side of the comparison prunes by."""

    score: str
    scope: str

    @property
    def symbols(self) -> dict[str, str]:
        """The lines of a configuration that select it."""
        lines = {f"TRAIN_PRUNE_{self.score.upper()}": "y"}
        return lines | ({"TRAIN_PRUNE_GLOBAL": "y"} if self.scope == "global" else {})


ARMS = {
    "ours": Arm("adam", "global"),
    "saliency": Arm("saliency", "global"),
    "magnitude_matrix": Arm("magnitude", "matrix"),
    "magnitude_global": Arm("magnitude", "global"),
    "random": Arm("random", "matrix"),
}
"""Scores with v_hat are comparable between matrices and get one threshold; magnitude has both, and
the better one speaks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run: dense where ``arm`` is None."""

    seed: int
    arm: str | None
    sparsity: float
    schedule: tuple[int, int]
    config: Path
    dense: Path
    """Configuration of the dense run of the seed."""


def write_jobs(
    preset: Path,
    folder: Path,
    num_seeds: int,
    grid: Mapping[tuple[int, int], Sequence[float]],
    *,
    quick: bool,
) -> list[Job]:
    """Write the .config of every run below ``folder``: the preset's lines with those of the arm.

    ``grid``: schedule, in percent of the steps -> sparsities.
    """
    lines = {name: assignment.value for name, assignment in read_assignments(preset).items()}
    every = {name: lines[name] for name in ("TRAIN_PRUNE_EVERY",) if name in lines}
    base = {name: value for name, value in lines.items() if not name.startswith(_DROPPED)}
    base |= {name: str(value) for name, value in QUICK.items()} if quick else {}
    config = load_config(preset)
    steps = int(base.get("TRAIN_STEPS", config.train.steps))
    base |= {"ENABLE_HIERARCHICAL_TIERING": "n", "TRAIN_EVAL_EVERY": str(steps)}
    jobs = []
    for seed in range(config.run.seed, config.run.seed + num_seeds):
        dense = folder / "configs" / f"seed{seed}-dense.config"
        arms = [(arm, sparsity, schedule) for schedule, own in grid.items() for sparsity in own
                for arm in ARMS]  # fmt: skip
        for arm, sparsity, schedule in [(None, 0.0, (0, 0)), *arms]:
            name = f"seed{seed}-"
            name += "dense" if arm is None else "{}-{}-{}-{}".format(arm, sparsity, *schedule)
            symbols = base | {
                "RUN_NAME": f'"{name}"',
                "RUN_OUTPUT_DIR": f'"{folder / ("quick" if quick else "runs")}"',
                "RUN_SEED": str(seed),
            }
            if arm is None:
                symbols["TRAIN_CHECKPOINT_EVERY"] = str(max(1, steps // _KEPT_CHECKPOINTS))
                symbols["TRAIN_KEEP_CHECKPOINTS"] = "y"
            else:
                symbols |= {"TRAIN_CHECKPOINT_EVERY": "0", "TRAIN_PRUNE": "y", **every}
                symbols |= ARMS[arm].symbols
                symbols["TRAIN_PRUNE_SPARSITY_PCT"] = str(round(sparsity * 100))
                symbols["TRAIN_PRUNE_START_PCT"] = str(schedule[0])
                symbols["TRAIN_PRUNE_END_PCT"] = str(schedule[1])
            path = folder / "configs" / f"{name}.config"
            write_text("".join(f"CONFIG_{n}={v}\n" for n, v in symbols.items()), path)
            jobs.append(
                Job(
                    seed=seed,
                    arm=arm,
                    sparsity=sparsity,
                    schedule=schedule,
                    config=path,
                    dense=dense,
                )
            )
    return jobs


def train_jobs(jobs: Sequence[Job], *, num_processes: int) -> list[float]:
    """Train the runs, dense ones first; returns their held-out losses in the order of ``jobs``."""
    losses: dict[Job, float] = {}
    dense = [job for job in jobs if job.arm is None]
    # The corpus is prepared by the first run alone, the others find it.
    stages = [dense[:1], dense[1:], [job for job in jobs if job.arm is not None]]
    for stage in stages:
        if num_processes == 1 or len(stage) < 2:
            results = [train_job(job) for job in stage]
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                num_processes, mp_context=context, initializer=_one_thread
            ) as pool:
                results = list(pool.map(train_job, stage))
        losses |= dict(zip(stage, results, strict=True))
    return [losses[job] for job in jobs]


def train_job(job: Job) -> float:
    """Train one run, or find it finished; returns its held-out loss in nats per token."""
    from gpt2.train import train

    config = load_config(job.config)
    if job.arm is not None and not (config.run.directory / "checkpoint").exists():
        branch_off(config, load_config(job.dense))
    result = train(config, job.config)
    if not result["complete"]:
        raise KeyboardInterrupt  # a signal stopped it; the next call continues
    return float(result["heldout_loss_nats"])


def branch_off(config: Config, dense: Config) -> None:
    """Give a run that prunes the dense run's last kept checkpoint before its schedule starts, if
    there is one, as its own: until then both are the same training.
    """
    import torch
    from safetensors.torch import save_file

    from gpt2.model import load_model
    from gpt2.pruning import MASKS_FILE
    from lib.precision.pruning import prunable_parameters

    assert config.train.prune is not None
    kept = sorted(
        (int(path.name), path)
        for path in (dense.run.directory / "steps").iterdir()
        if path.name.isdigit() and int(path.name) <= config.train.prune.start_step
    )
    if not kept:
        return
    _, source = kept[-1]
    folder = config.run.directory
    partial = folder / ".checkpoint.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    masks = {
        name: torch.ones(parameter.shape, dtype=torch.bool)
        for name, parameter in prunable_parameters(load_model(source, dropout=0.0)).items()
    }
    save_file(masks, partial / MASKS_FILE)
    shutil.copyfile(dense.run.directory / "metrics.jsonl", folder / "metrics.jsonl")
    write_json(asdict(config), folder / "config.json")
    partial.rename(folder / "checkpoint")


def prune_once(config_path: Path, sparsities: Sequence[float]) -> dict[float, dict[str, float]]:
    """Return sparsity -> arm -> held-out perplexity of a finished dense run pruned in one step."""
    import torch
    from safetensors.torch import load_file

    from gpt2.checkpoint import HELDOUT_FILE, load_optimizer
    from gpt2.model import load_model
    from gpt2.trainer import build_optimizer, token_losses
    from lib.precision.pruning import (
        PruneScope,
        PruneScore,
        prunable_parameters,
        score_weights,
        select_masks,
    )

    config = load_config(config_path)
    folder = config.run.directory / "checkpoint"
    network = load_model(folder, dropout=0.0).eval()
    optimizer = build_optimizer(network, config.train)
    load_optimizer(folder, network, optimizer)
    batches = load_file(folder / HELDOUT_FILE)["tokens"].split(config.train.batch_size)
    parameters = prunable_parameters(network)
    weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    scores = {
        arm: score_weights(
            parameters, PruneScore(ARMS[arm].score), optimizer=optimizer, seed=config.run.seed
        )
        for arm in ARMS
    }

    @torch.no_grad()
    def perplexity() -> float:
        losses = [token_losses(network, rows, rows[:, 1:]).flatten() for rows in batches]
        return math.exp(torch.cat(losses).mean(dtype=torch.float64).item())

    dense = perplexity()
    rows: dict[float, dict[str, float]] = {}
    for sparsity in sparsities:
        rows[sparsity] = {"dense": dense}
        for arm in ARMS:
            masks = select_masks(scores[arm], sparsity, scope=PruneScope(ARMS[arm].scope))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name] * masks[name])
            rows[sparsity][arm] = perplexity()
    return rows


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
