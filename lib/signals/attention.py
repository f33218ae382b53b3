"""``attention_fim_trace``: trace of the Fisher information of attention *probabilities*, per head.

For the categorical distribution p that a query puts on the keys, the Fisher information with
respect to its logits is diag(p) - p p^T, with trace 1 - sum_j p_j^2. The mean over queries says how
spread attention is: 0 when every query looks at one key, 1 - H_T / T (0.9576 at T = 128, H the
harmonic number) when causal attention is uniform over T positions.

It is not the Fisher information of parameters (``fisher``), nor an estimate of it, and ranks
nothing.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Block, BlockKind, partition_model, unique_parameters, unwrap_model
from ..blocks.faults import find_fault
from ..errors import InputError
from .summary import causal_logits, check_token_ids


def attention_fim_trace(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, list[float]]:
    """Return attention block -> one value per head: the mean of 1 - sum_j p_j^2 over queries.

    ``model``: a Hugging Face causal LM; ``batches``: token ids (B, T) of real text without padding.
    Attention is computed by the eager implementation, one sequence at a time, and each layer's
    probabilities are reduced as they appear: peak memory is one layer's (heads, T, T). Mode and
    implementation are restored. Raises InputError if the model has no attention block, or one that
    doesn't return its probabilities.
    """
    model = unwrap_model(model)
    blocks = [b for b in partition_model(model) if b.kind is BlockKind.ATTENTION]
    if not blocks:
        raise InputError(f"{type(model).__name__} has no attention block")
    sums: dict[str, Tensor] = {}
    queries: dict[str, int] = {}
    device = next(iter(unique_parameters(model).values())).device
    handles = [
        model.get_submodule(block.modules[0]).register_forward_hook(_reducer(block, sums, queries))
        for block in blocks
    ]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with _eager_attention(model), torch.no_grad():
            for batch in batches:
                check_token_ids(batch, model)
                for ids in torch.split(batch, 1):
                    causal_logits(model, ids.to(device))
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    if not sums:
        raise InputError("no text to measure attention on: give at least one batch")
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            fault = find_fault(model) or "activations overflow (try float32)"
            raise FloatingPointError(f"attention of {name!r} isn't finite: {fault}")
    return {
        block.name: (sums[block.name] / queries[block.name]).tolist()
        for block in blocks
        if block.name in sums
    }


def _reducer(block: Block, sums: dict[str, Tensor], queries: dict[str, int]) -> Any:
    def reduce(module: nn.Module, args: object, output: object) -> None:
        probabilities = _probabilities(block, output)
        traces = 1 - probabilities.float().square().sum(-1)  # (B, heads, queries)
        total = traces.sum((0, 2)).cpu().double()
        sums[block.name] = sums[block.name] + total if block.name in sums else total
        queries[block.name] = (
            queries.get(block.name, 0) + probabilities.shape[0] * probabilities.shape[2]
        )

    return reduce


def _probabilities(block: Block, output: object) -> Tensor:
    """Find the (B, heads, queries, keys) probabilities among what an attention module returned."""
    parts = output if isinstance(output, tuple) else ()
    for part in parts[1:]:
        if isinstance(part, Tensor) and part.dim() == 4:
            return part
    raise InputError(
        f"attention block {block.name!r} returns no probabilities with eager attention: "
        "attention_fim_trace can't be "
        "measured on this model"
    )


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Switch a Hugging Face model, nested configs included, to eager attention and back."""
    config: Any = getattr(model, "config", None)
    change: Any = getattr(model, "set_attn_implementation", None)
    if config is None or change is None:
        raise InputError(
            f"{type(model).__name__} is not a Hugging Face model: its attention can't be made "
            "visible"
        )
    before = _implementations(config)
    try:
        change("eager")
        if config._attn_implementation != "eager":
            raise InputError(
                f"{type(model).__name__} can't switch from {config._attn_implementation} to eager "
                "attention: load it "
                "with attn_implementation='eager'"
            )
        yield
    finally:
        change(before)


def _implementations(config: Any) -> Any:
    """Return a config's attention implementation, nested for sub-configs, as the model sets it."""
    nested = {
        key: _implementations(sub)
        for key in getattr(config, "sub_configs", {})
        if (sub := getattr(config, key, None)) is not None
    }
    return {"": config._attn_implementation, **nested} if nested else config._attn_implementation
