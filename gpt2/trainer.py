"""The trainer: AdamW with warm-up and cosine, accumulation, clipping, evaluation, checkpoints.

On a CPU a continued run equals an unbroken one bit for bit: the batch and the dropout of step s are
functions of (seed, s), and nothing else carries state but the weights, Adam's moments, MomentScale,
the counts of the routers and the masks of pruning, all of which the checkpoint holds. Losses are in
nats per token.
"""

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lib.blocks import unique_parameters, unwrap_model
from lib.config import Config, TrainConfig
from lib.errors import InputError
from lib.signals import MomentScale, RouterCounter, reshard

from .balance import BalanceLoss
from .checkpoint import TrainerState, keep_checkpoint, load_optimizer, save_checkpoint
from .data import Corpus, heldout_windows, sample_windows
from .distributed import (
    World,
    autocast_dtype,
    gradient_norm,
    gradient_sync,
    is_main,
    log,
    show_progress,
    wrap_model,
)
from .model import build_model, load_model
from .pruning import Pruner
from .rundir import RunDirectory
from .stopping import StopSignals, plain_step_errors

_LOG_SECONDS = 10.0
_DIVERGED_FIX = "lower TRAIN_LEARNING_RATE, raise TRAIN_WARMUP_STEPS, or set TRAIN_CLIP"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step measured, the same on every rank."""

    loss: float
    gradient_norm: float
    clip_coefficient: float
    stop: bool
    balance: float | None  # mean load-balance loss of the layers, 1 where experts share evenly


class Trainer:
    """One run in memory: the network, its optimizer, and the step it is at."""

    def __init__(
        self,
        config: Config,
        world: World,
        corpus: Corpus,
        run: RunDirectory,
        state: TrainerState | None,
    ) -> None:
        """Build the network and its optimizer, or load both from the run's checkpoint when
        ``state`` is given.
        """
        self.config = config.train
        self.context = config.model.context
        self.seed = config.run.seed
        self.world = world
        self.corpus = corpus
        self.run_directory = run
        if state is None:
            check_vocabulary(config, corpus)
        network = (
            build_model(config.model, corpus.tokenizer, seed=self.seed)
            if state is None
            else load_model(run.checkpoint, dropout=config.model.dropout)
        )
        self.model = wrap_model(
            network, world, parallel=self.config.parallel, compiled=self.config.compile
        )
        self.network: Any = unwrap_model(self.model)
        self.network.train()  # from_pretrained returns a network in evaluation mode
        self.optimizer = build_optimizer(self.network, self.config)
        self.parameters = list(unique_parameters(self.network).values())
        prune = self.config.prune
        self.pruner = Pruner(self.network, prune, seed=self.seed) if prune else None
        moe = config.model.moe
        self.balance = BalanceLoss(self.network, moe.balance, world) if moe else None
        self.heldout = torch.from_numpy(
            heldout_windows(
                corpus.heldout, num_windows=self.config.eval_sequences, length=self.context
            )
        )
        if len(self.heldout) < self.config.eval_sequences:
            log(
                f"TRAIN_EVAL_SEQUENCES={self.config.eval_sequences}, but {corpus.name} has "
                f"held-out text for {len(self.heldout)} sequences: evaluating on these"
            )
        if state is None:
            self.scale = MomentScale(self.config.beta2)
            state = TrainerState(
                step=0,
                complete=False,
                corpus_digest=corpus.digest,
                train_loss=math.nan,
                heldout_loss=None,
                unigram_entropy=corpus.unigram_entropy,
                tokens=0,
                train_seconds=0.0,
                scale={},
                router_counts={},
            )
            size = sum(parameter.numel() for parameter in self.parameters)
            log(
                f"training {size / 1e6:.1f} M parameters for {self.config.steps} steps of "
                f"{self.tokens_per_step:,} tokens of {corpus.name} on {world.size} x "
                f"{world.device.type}"
            )
        else:
            load_optimizer(run.checkpoint, self.network, self.optimizer)
            if self.pruner is not None:
                self.pruner.load_masks(run.checkpoint)
            self.scale = MomentScale.from_state_dict(state.scale)
            log(f"continuing {run.path} after step {state.step} of {self.config.steps}")
        self.router = RouterCounter(self.network, training=True, counts=state.router_counts)
        self.state = state

    @property
    def tokens_per_step(self) -> int:
        """Tokens whose loss one optimizer step averages, over accumulation and all processes."""
        return self.config.batch_size * self.config.accumulation * self.context

    def run(self) -> TrainerState:
        """Train until the last step or a signal; returns the state, which then is on the disk
        too.
        """
        from tqdm import tqdm

        if is_main():
            self.run_directory.start_metrics(self.state.step)
        step = saved_step = self.state.step
        loss, heldout_loss = self.state.train_loss, self.state.heldout_loss
        seconds, last_log = self.state.train_seconds, -math.inf
        with (
            StopSignals() as signals,
            tqdm(
                total=self.config.steps, initial=step, unit="step", disable=not show_progress()
            ) as bar,
        ):
            while step < self.config.steps:
                step += 1
                started = time.perf_counter()
                with plain_step_errors(self.config):
                    result = self._step(step, saved_step=saved_step, stop=signals.received)
                duration = time.perf_counter() - started
                seconds += duration
                loss = result.loss
                self.scale.update(
                    tokens=self.tokens_per_step, clip_coefficient=result.clip_coefficient
                )
                self.run_directory.write_metrics(
                    step=step,
                    loss=loss,
                    lr=learning_rate(step, self.config),
                    grad_norm=result.gradient_norm,
                    clip_coefficient=result.clip_coefficient,
                    tokens_per_s=self.tokens_per_step / duration,
                    time_s=seconds,
                    **({} if self.pruner is None else {"sparsity": self.pruner.sparsity}),
                    **({} if result.balance is None else {"balance_loss": result.balance}),
                )
                complete = step == self.config.steps
                if complete or step % self.config.eval_every == 0:
                    heldout_loss = self.evaluate()
                    self.run_directory.write_metrics(step=step, heldout_loss=heldout_loss)
                bar.update()
                text = f"loss {loss:.3f}" + (
                    f", held-out {heldout_loss:.3f}" if heldout_loss else ""
                )
                bar.set_postfix_str(text)
                if bar.disable and (time.perf_counter() - last_log > _LOG_SECONDS or complete):
                    last_log = time.perf_counter()
                    log(
                        f"step {step}/{self.config.steps}: {text}, "
                        f"{self.tokens_per_step / duration:,.0f} tokens/s"
                    )
                due = self.config.checkpoint_every and step % self.config.checkpoint_every == 0
                if complete or result.stop or due:
                    self.state = TrainerState(
                        step=step,
                        complete=complete,
                        corpus_digest=self.corpus.digest,
                        train_loss=loss,
                        heldout_loss=heldout_loss,
                        unigram_entropy=self.corpus.unigram_entropy,
                        tokens=step * self.tokens_per_step,
                        train_seconds=seconds,
                        scale=self.scale.state_dict(),
                        router_counts=self.router.fold(self.world.add),
                    )
                    self._save()
                    saved_step = step
                if result.stop:
                    break
        return self.state

    def _step(self, step: int, *, saved_step: int, stop: bool) -> StepResult:
        """Take one optimizer step; weights stay as they are when the loss or the gradient isn't
        finite.
        """
        torch.manual_seed(
            int(np.random.SeedSequence([self.seed, step, self.world.rank]).generate_state(1)[0])
        )
        batch_size, accumulation = self.config.batch_size, self.config.accumulation
        windows = torch.from_numpy(
            sample_windows(
                self.corpus.train,
                seed=self.seed,
                step=step,
                num_windows=batch_size * accumulation,
                length=self.context + 1,
            )
        ).split(batch_size)
        loss_sum = torch.zeros((), device=self.world.device)
        balance_sum = torch.zeros((), device=self.world.device)
        for index, window in enumerate(windows):
            tokens = window[self.world.rows(batch_size)].to(self.world.device)
            with gradient_sync(self.model, last=index == accumulation - 1):
                with self._autocast():
                    losses = token_losses(self.model, tokens[:, :-1], tokens[:, 1:])
                loss = losses.mean() / accumulation
                loss_sum += loss.detach()
                if self.balance is not None:
                    balance = self.balance.take() / accumulation
                    balance_sum += balance.detach()
                    loss = loss + self.balance.weight * balance
                loss.backward()
        share = 1 / self.world.size
        loss_value, norm, stops, balance_value = self.world.total(
            [
                loss_sum * share,
                gradient_norm(self.parameters) * share,
                float(stop),
                balance_sum * share,
            ]
        )
        if not math.isfinite(loss_value) or not math.isfinite(norm):
            kept = (
                f"the checkpoint of step {saved_step} is untouched"
                if saved_step
                else "no checkpoint yet"
            )
            raise FloatingPointError(
                f"step {step}: loss {loss_value}, gradient norm {norm}: training diverged "
                f"({kept}); {_DIVERGED_FIX}"
            )
        coefficient = min(1.0, self.config.clip / (norm + 1e-6)) if self.config.clip else 1.0
        if coefficient < 1:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(coefficient)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config)
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.after_step(self.optimizer, step)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(
            loss_value,
            norm,
            coefficient,
            stop=stops > 0,
            balance=None if self.balance is None else balance_value,
        )

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the mean loss over the held-out sequences; each has one prediction less than
        tokens.
        """
        self.network.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for rows in self.heldout.split(self.config.batch_size):
            # Every rank runs as many passes of the same shape: under FSDP2 each is collective.
            padded = torch.zeros((self.config.batch_size, self.context), dtype=torch.int64)
            padded[: len(rows)] = rows
            mine = self.world.rows(self.config.batch_size)
            tokens = padded[mine].to(self.world.device)
            with self._autocast():
                losses = token_losses(self.network, tokens, tokens[:, 1:])
            total += losses[: max(0, len(rows) - mine.start)].sum(dtype=torch.float64)
        reshard(self.network)
        self.network.train()
        loss = self.world.total([total])[0] / (len(self.heldout) * (self.context - 1))
        if not math.isfinite(loss):
            raise FloatingPointError(f"held-out loss {loss}: training diverged; {_DIVERGED_FIX}")
        return loss

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = autocast_dtype(self.world.device)
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=dtype is not None)

    def _save(self) -> None:
        save_checkpoint(
            self.run_directory.checkpoint,
            network=self.network,
            optimizer=self.optimizer,
            tokenizer=self.corpus.tokenizer,
            heldout=self.heldout,
            heldout_metadata={
                "corpus": self.corpus.name,
                "corpus_digest": self.corpus.digest,
                "unigram_entropy_nats": repr(self.corpus.unigram_entropy),
            },
            masks={} if self.pruner is None else self.pruner.state_dict(),
            state=self.state,
        )
        if self.config.keep_checkpoints and is_main():
            keep_checkpoint(
                self.run_directory.checkpoint, self.run_directory.steps / str(self.state.step)
            )


def check_vocabulary(config: Config, corpus: Corpus) -> None:
    """Refuse embedding rows for tokens that the corpus' own BPE does not have."""
    own_bpe = not config.data.tokenizer and not config.model.pretrained
    if own_bpe and len(corpus.tokenizer) < config.model.vocab_size:
        raise InputError(
            f"GPT2_VOCAB_SIZE={config.model.vocab_size}, but {corpus.name} gives a BPE of only "
            f"{len(corpus.tokenizer)} tokens: lower it to that, or take more text"
        )


def token_losses(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy (B, N) of targets (B, N), the tokens after the first N of
    ``tokens`` (B, T >= N).
    """
    logits = model(input_ids=tokens, use_cache=False).logits[:, : targets.shape[1]]
    return nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW, fused, with weight decay on matrices and embeddings alone (GPT-2's and
    nanoGPT's choice).
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the rate of step 1, 2, ...: linear warm-up, then a cosine to ``min_lr_ratio`` of
    the peak at the last step.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
