"""``TierHintsCallback``: one line gives a Hugging Face ``Trainer`` run a ``tier_hints.json``.

The scale of the moment (``scale``) needs two numbers of each optimizer step that the Trainer gives
to no callback: how many tokens the loss averaged, and by how much gradients were clipped. ``meter``
measures both; the coefficient is also compared with the gradient norm that the Trainer logs. Where
that can't be right (sharded gradients, fp16, another loss) the scale is recorded as unknown, with
the reason: the ranking stands, no Fisher trace is given.

From the first step on nothing here may end the user's run: what fails is said in a warning, and the
hints, or their scale, are missing.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.trainer_callback import ExportableState

from ..blocks import is_sharded, unique_parameters
from ..files import check_writable
from ..hints import Hints, save_hints
from ..units import parse_thresholds
from .adam import adam_hints
from .meter import UpdateMeter, add_over_processes, explain, warn_safely
from .optimizers import moment_beta2, unwrap_optimizer
from .router import RouterCounter, router_signals
from .scale import MomentScale
from .summary import refuse_fsdp1

_CLIP_TOLERANCE = 0.01
"""Largest relative difference to the coefficient that the logged gradient norm implies."""


class TierHintsCallback(TrainerCallback, ExportableState):
    """Write tier hints at the end of training, and beside each checkpoint.

    Usage: ``Trainer(..., callbacks=[TierHintsCallback("tier_hints.json")])``.

    ``path``: where the hints of the finished run go; each checkpoint folder gets a file of the same
    name, unless ``with_checkpoints`` is False. Thresholds: cumulative fractions of weight bytes in
    [0, 1], HBM <= CPU. ``model_id`` and ``revision``: what the file calls the model (default:
    ``hub_model_id`` or ``output_dir``, and the step).

    Raises InputError before the first step for thresholds out of range, a path that can't be
    written, and optimizers without an elementwise second moment. After it, what can't be measured
    or written (moments that are no longer finite, a full disk) is a warning: training goes on. A
    resumed run continues the measurement from its checkpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "tier_hints.json",
        *,
        hbm_threshold: float = 0.3,
        cpu_threshold: float = 0.8,
        model_id: str | None = None,
        revision: str | None = None,
        with_checkpoints: bool = True,
    ) -> None:
        self.path = os.fspath(path)
        self.hbm_threshold, self.cpu_threshold = parse_thresholds(hbm_threshold, cpu_threshold)
        self.model_id = model_id
        self.revision = revision
        self.with_checkpoints = with_checkpoints
        self.hints: Hints | None = None
        """The hints last made, on the process that wrote them."""
        self._scale: MomentScale | None = None
        self._obstacle: str | None = None
        self._meter: UpdateMeter | None = None
        self._router: RouterCounter | None = None
        self._counts: dict[str, int] = {}
        self._pending: tuple[float | None, float | None] = (None, None)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer puts into a checkpoint's ``trainer_state.json``."""
        return {
            "args": {
                "path": self.path,
                "hbm_threshold": self.hbm_threshold,
                "cpu_threshold": self.cpu_threshold,
                "model_id": self.model_id,
                "revision": self.revision,
                "with_checkpoints": self.with_checkpoints,
            },
            "attributes": {
                "stored_scale": None if self._scale is None else self._scale.state_dict(),
                "stored_router_counts": self._counts,
            },
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check what can be checked early, restore a resumed run's scale, install the hooks."""
        model, optimizer = kwargs["model"], unwrap_optimizer(kwargs["optimizer"])
        refuse_fsdp1(model)
        if state.is_world_process_zero:
            check_writable(self.path)
        beta2 = {moment_beta2(optimizer, group) for group in optimizer.param_groups}
        self._obstacle = _scale_obstacle(args, model, beta2)
        self._scale = None if self._obstacle else _restore_scale(self, state, beta2.pop())
        if self._meter is not None:
            self._meter.remove()
        self._meter = (
            None
            if self._obstacle
            else UpdateMeter(
                model,
                world_size=args.world_size,
                global_items=args.average_tokens_across_devices or args.world_size == 1,
                clips=bool(args.max_grad_norm),
            )
        )
        self._counts = _stored(self, state, "stored_router_counts") or {}
        if self._router is not None:
            self._router.remove()
        self._router = RouterCounter(model, training=True, counts=self._counts)
        # A checkpoint made without this callback has no entry for it, and without one the Trainer's
        # next save fails with a KeyError.
        _callback_states(state).setdefault(type(self).__name__, self.state())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what an interrupted update left behind."""
        if self._meter is not None:
            self._meter.reset()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a micro-batch whose gradients were accumulated."""
        if self._meter is not None:
            self._meter.micro_batches += 1

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the update's tokens and clip coefficient; gradients are clipped by now."""
        if self._meter is not None:
            self._meter.micro_batches += 1
            with self._measuring(state):
                self._pending = self._meter.measure()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Account for the update unless it was skipped."""
        skipped = getattr(kwargs["optimizer"], "step_was_skipped", False)
        if self._scale is not None and not skipped:
            tokens, coefficient = self._pending
            with self._measuring(state):
                self._scale.update(tokens=tokens, clip_coefficient=coefficient)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up what all processes routed; later, only one of them is asked for a state."""
        if self._router is not None:
            self._counts = self._router.fold(add_over_processes)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the measured clip coefficient with the gradient norm that the Trainer logs."""
        norm, coefficient = (logs or {}).get("grad_norm"), self._pending[1]
        if self._obstacle or norm is None or coefficient is None or not args.max_grad_norm:
            return
        with self._measuring(state):
            expected = min(1.0, args.max_grad_norm / (float(norm) + 1e-6))
            if not math.isclose(coefficient, expected, rel_tol=_CLIP_TOLERANCE):
                self._drop_scale(
                    f"the measured clip coefficient {coefficient:.4g} disagrees with the logged "
                    f"gradient norm {float(norm):.4g} (step {state.global_step})"
                )

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the hints of a checkpoint beside its weights."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.with_checkpoints:
            path = folder / Path(self.path).name
            with self._writing(path, state):
                self._write(path, args, state, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the hints and take the hooks out of the model."""
        if self._meter is not None:
            self._meter.remove()
            self._meter = None
        if self._router is not None:
            self._router.remove()
            self._router = None
        with self._writing(Path(self.path), state):
            self._write(Path(self.path), args, state, final=True, **kwargs)

    @contextmanager
    def _measuring(self, state: TrainerState) -> Iterator[None]:
        """Let a failure cost the scale, not the run; the meter goes on, as other ranks await it."""
        try:
            yield
        except Exception as error:  # whatever the cause, training must go on
            reason = f"measuring failed at step {state.global_step}: {explain(error)}"
            self._drop_scale(reason)
            warn_safely(f"the scale of the tier hints will be unknown, {reason}")

    @contextmanager
    def _writing(self, path: Path, state: TrainerState) -> Iterator[None]:
        """Let a failure cost the hints, not the run."""
        try:
            yield
        except Exception as error:  # whatever the cause, training must go on
            message = f"no tier hints of step {state.global_step} are written: {explain(error)}"
            if os.path.exists(path):
                message += f" ({path} is an older file)"
            best = Path(state.best_model_checkpoint or "") / path.name
            if state.best_model_checkpoint and best != path and best.exists():
                message += f"; the best checkpoint has hints of its own, {best}"
            warn_safely(message)

    def _drop_scale(self, reason: str) -> None:
        """Record the scale as unknown; a resumed run may not trust it either."""
        self._obstacle, self._scale = reason, None

    def _write(
        self,
        path: Path,
        args: TrainingArguments,
        state: TrainerState,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        final: bool = False,
        **kwargs: Any,
    ) -> None:
        sharded = any(is_sharded(p) for p in unique_parameters(model).values())
        if not (state.is_world_process_zero or sharded):
            return
        scale, obstacle = self._scale_values(optimizer)
        config = getattr(model, "config", None)
        # At its end the Trainer may have loaded older, better weights; the moments stay the last.
        best_loaded = final and args.load_best_model_at_end and bool(state.best_model_checkpoint)
        weights_step = state.best_global_step if best_loaded else state.global_step
        hints = adam_hints(
            optimizer,
            model,
            model_id=self.model_id or args.hub_model_id or str(args.output_dir),
            revision=f"step-{weights_step}" if self.revision is None else self.revision,
            hbm_threshold=self.hbm_threshold,
            cpu_threshold=self.cpu_threshold,
            tokens_per_update=scale[0],
            clip=float(args.max_grad_norm or 0),
            mean_clip_sq=scale[1],
            accumulation=args.gradient_accumulation_steps,
            world_size=args.world_size,
            # Loss scaling skips optimizer steps that the Trainer counts: no sign of a reset.
            global_step=None if args.fp16 else state.global_step,
            extra_signals=router_signals(self._counts),
            extra_provenance={
                "trainer": "transformers.Trainer",
                **({"router_counts": "while training"} if self._counts else {}),
                "scale_unknown": obstacle,
                "weights_step": weights_step,
                "router_auxiliary_loss": float(getattr(config, "router_aux_loss_coef", 0.0))
                if getattr(config, "output_router_logits", False)
                else 0.0,
            },
        )
        # A hyperparameter search keeps its checkpoints elsewhere: no folder, no file.
        if state.is_world_process_zero and (final or path.parent.is_dir()):
            save_hints(hints, path)
            self.hints = hints

    def _scale_values(
        self, optimizer: Optimizer
    ) -> tuple[tuple[float | None, float | None], str | None]:
        """Return (tokens_per_update, mean_clip_sq) and why they are unknown, if they are."""
        if self._obstacle is not None or self._scale is None:
            return (None, None), self._obstacle or "training has not begun"
        states = unwrap_optimizer(optimizer).state.values()
        step = max((int(state.get("step", 0)) for state in states), default=0)
        values = self._scale.values(step)
        if values is None:
            return (None, None), (
                f"of the {step} updates in the moments, those seen make up "
                f"{self._scale.coverage(step):.2%} "
                "of their window"
            )
        return values, None


def _scale_obstacle(args: TrainingArguments, model: nn.Module, beta2: set[float]) -> str | None:
    """Say why tokens and clipping can't be measured in this run, or None."""
    config = getattr(model, "config", None)
    loss = getattr(model, "loss_function", None)
    loss_name = getattr(loss, "__name__", loss)
    sharded = any(is_sharded(p) for p in unique_parameters(model).values())
    checks: dict[str, bool] = {
        f"parameter groups differ in beta2 ({sorted(beta2)})": len(beta2) > 1,
        f"the loss ({loss_name}) isn't the mean log-likelihood of next tokens": (
            loss is not ForCausalLMLoss or bool(getattr(config, "is_encoder_decoder", False))
        ),
        "label smoothing changes the loss": args.label_smoothing_factor != 0,
        "DataParallel splits batches over threads: use torchrun": args.n_gpu > 1,
        "tensor, context or sequence parallel runs share tokens between ranks": (
            getattr(args, "parallelism_config", None) is not None
        ),
        "fp16 scales the loss": bool(args.fp16),
        "clipping of sharded gradients isn't measured": sharded and bool(args.max_grad_norm),
    }
    return next((reason for reason, found in checks.items() if found), None)


def _restore_scale(callback: TierHintsCallback, state: TrainerState, beta2: float) -> MomentScale:
    """Return the scale a checkpoint stored for this callback, or a new one."""
    stored = _stored(callback, state, "stored_scale")
    if stored is not None and stored.get("beta2") == beta2:
        return MomentScale.from_state_dict(stored)
    return MomentScale(beta2)


def _stored(callback: TierHintsCallback, state: TrainerState, name: str) -> Any:
    """Return what a resumed run's checkpoint stored for this callback, or None."""
    if state.global_step > 0:
        entries = _callback_states(state).get(type(callback).__name__) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            if (stored := entry["attributes"].get(name)) is not None:
                return stored
    return None


def _callback_states(state: TrainerState) -> dict[str, Any]:
    """Return class name -> stored state, or a list of them; upstream annotates it as a list."""
    return cast(dict[str, Any], state.stateful_callbacks)
