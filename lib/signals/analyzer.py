"""Tiers straight from an optimizer's state, for those who want no hints file."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from ..hints import assign_tiers
from ..units import parse_thresholds
from ..vocabulary import Tier
from .adam import collect_adam_signal


@dataclass(frozen=True, slots=True)
class AdamStateTierAnalyzer:
    """Tiers straight from an optimizer's state.

    Thresholds are cumulative fractions of weight bytes in [0, 1], HBM <= CPU.
    """

    hbm_threshold: float = 0.4
    cpu_threshold: float = 0.6

    def __post_init__(self) -> None:
        parse_thresholds(self.hbm_threshold, self.cpu_threshold)

    def analyze_optimizer_states(self, optimizer: Optimizer, model: nn.Module) -> dict[str, Tier]:
        """Return block -> tier, ordered by mean v_hat per weight; as ``collect_adam_signal``."""
        hbm_threshold, cpu_threshold = parse_thresholds(self.hbm_threshold, self.cpu_threshold)
        signal = collect_adam_signal(optimizer, model)
        return assign_tiers(
            {block.name: block.num_bytes for block in signal.blocks},
            signal.density,
            hbm_threshold=hbm_threshold,
            cpu_threshold=cpu_threshold,
        )
