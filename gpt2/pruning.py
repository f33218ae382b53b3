"""Gradual pruning while the network trains: masks that grow on a schedule and hold at every step.

After each optimizer step pruned weights are set to zero again. Their gradients still flow, so
Adam's moments, and the hints made of them, say of pruned weights too what they would matter. The
masks are the only state, and a checkpoint holds them (``pruning.safetensors``), so a run that was
stopped continues to the same result.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from lib.config import PruneConfig
from lib.errors import InputError
from lib.precision.pruning import (
    PruneScope,
    PruneScore,
    cubic_sparsity,
    measured_sparsity,
    prunable_parameters,
    score_weights,
    select_masks,
)

from .distributed import like_parameter, log

MASKS_FILE = "pruning.safetensors"


class Pruner:
    """The masks of a network that is being trained; ``sparsity`` is the share pruned so far."""

    def __init__(self, network: nn.Module, config: PruneConfig, *, seed: int) -> None:
        self.parameters = prunable_parameters(network)
        self._config = config
        self._seed = seed
        self._masks: dict[str, Tensor] = {}  # whole, on the parameters' device
        self._placed: dict[str, Tensor] = {}  # the same, sharded as the parameters are
        self._place(
            {
                name: torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
                for name, parameter in self.parameters.items()
            }
        )
        size = sum(mask.numel() for mask in self._masks.values())
        log(
            f"pruning {size / 1e6:.1f} M weights to {config.sparsity:.0%} by {config.score} from "
            f"step {config.start_step} to {config.end_step}"
        )

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer, step: int) -> None:
        """Extend the masks if the schedule says so, and set pruned weights to zero (collective)."""
        config = self._config
        ramp = config.start_step < step <= config.end_step
        if ramp and ((step - config.start_step) % config.every == 0 or step == config.end_step):
            scores = score_weights(
                self.parameters, PruneScore(config.score), optimizer=optimizer, seed=self._seed
            )
            sparsity = cubic_sparsity(
                step, final=config.sparsity, start=config.start_step, end=config.end_step
            )
            scope = PruneScope(config.scope)
            self._place(select_masks(scores, sparsity, scope=scope, masks=self._masks))
        for name, mask in self._placed.items():
            self.parameters[name].mul_(mask)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold: parameter name -> whole boolean mask on the CPU."""
        return {name: mask.cpu() for name, mask in self._masks.items()}

    def load_masks(self, checkpoint: Path) -> None:
        """Take the masks of a checkpoint folder; InputError if they are damaged."""
        path = checkpoint / MASKS_FILE
        try:
            masks = load_file(path)
            for name, mask in self._masks.items():
                if masks[name].dtype != torch.bool or masks[name].shape != mask.shape:
                    raise ValueError(f"the mask of {name} has another shape or type")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise InputError(
                f"checkpoint file {path} is damaged ({type(error).__name__}: {error}): delete the "
                f"folder {checkpoint} to train again from the start"
            ) from error
        self._place({n: masks[n].to(mask.device) for n, mask in self._masks.items()})

    def _place(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        self.sparsity = measured_sparsity(masks)
        # Numbers, because a DTensor of booleans can't be distributed over every backend.
        self._placed = {
            name: like_parameter(mask.to(torch.uint8), self.parameters[name])
            for name, mask in masks.items()
        }
