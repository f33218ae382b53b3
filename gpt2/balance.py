"""The load-balance loss of a mixture of experts, for each layer by itself over the whole batch.

With f_i the share of the batch's routed slots that went to expert i and P_i the batch's mean
probability of i, a layer's loss is E sum_i f_i P_i, 1 where experts share evenly (Fedus et al.
2021, "Switch Transformers", arXiv 2101.03961). Two things differ from transformers' own loss. It is
taken per layer: pooled over layers, one collapsed layer hides behind the others. And f is that of
the batch of all processes: balance within each sequence would forbid that experts specialize on
kinds of text (Qiu et al. 2025, "Demons in the Detail", arXiv 2501.11873).
"""

from typing import Any

import torch
from torch import Tensor, nn

from .distributed import World


class BalanceLoss:
    """Notes what the routers of a network choose in each training pass.

    ``weight``: what the loss counts beside the cross-entropy.
    """

    def __init__(self, network: nn.Module, weight: float, world: World) -> None:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

        self.weight = weight
        self._world = world
        self._passed: list[tuple[Tensor, Tensor]] = []
        for module in network.modules():
            if isinstance(module, Qwen3MoeTopKRouter):
                module.register_forward_hook(self._note)

    def take(self) -> Tensor:
        """Return the mean loss of the layers in the pass since the last call, a scalar; collective.

        Gradients reach the probabilities, not the shares, which are counts.
        """
        layers = [layer_balance(logits, ids, self._world) for logits, ids in self._passed]
        self._passed.clear()
        return torch.stack(layers).mean()

    def _note(self, router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if router.training:
            logits, _, ids = output
            self._passed.append((logits, ids))


def layer_balance(logits: Tensor, ids: Tensor, world: World) -> Tensor:
    """Return E sum_i f_i P_i of router logits (tokens, E) and chosen experts (tokens, k).

    f is that of all processes, P of this one: averaged over processes, as gradients are, the loss
    is that of the whole batch.
    """
    num_experts = logits.shape[-1]
    counts = torch.zeros(num_experts, device=logits.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones(ids.numel(), device=logits.device))
    counts = world.add(counts)
    mean_probability = logits.float().softmax(-1).mean(0)
    return num_experts * (counts / counts.sum() * mean_probability).sum()
