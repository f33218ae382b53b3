"""Fisher information of cached keys and values, per layer, and the damage of compressing them.

An error delta in the keys or values that a sequence of T tokens leaves in the cache changes the
distributions of its tokens by, to second order and in nats per token,

    KL  ~  1/(2T) sum_i F_ii delta_i^2          F_ii = E[(d sum_t log p(y_t) / d x_i)^2]

where x_i are the cached numbers and y_t are labels drawn from the model at every position: their
gradients are independent with mean zero, so one backward pass of the summed loss is unbiased (as in
``fisher``, which says what labels of the text give instead). The trace is the same with delta = 1.
``directional`` is 1/(2T) E[(g . delta)^2], which also knows how the errors of one sequence
correlate.

Keys and values are seen where the model hands them to its cache: after rotary embedding, before
grouped heads are repeated, that is, as any cache stores them.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..blocks import BlockKind, partition_model, unwrap_model
from ..blocks.faults import find_fault
from ..errors import InputError
from .gradients import FisherLabels, check_batch, sample_labels

RoundTrip = Callable[[Tensor], Tensor]
"""Keys or values (B, heads, T, dim) to what a compressed cache gives back for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvDamage:
    """Predicted KL in nats per token of compressing one layer's keys, and its values."""

    keys: float
    values: float
    directional: float
    """Of both together."""

    @property
    def total(self) -> float:
        """Keys and values, by the diagonal."""
        return self.keys + self.values


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayer:
    """What one layer's cache carries."""

    layer: int
    block: str
    """The attention block that reads it."""
    keys_trace: float
    """Sum of F_ii over the keys, per token."""
    values_trace: float
    damage: Mapping[str, KvDamage]
    """Name of a round trip -> what it would cost."""

    @property
    def trace(self) -> float:
        """Fisher trace of keys and values."""
        return self.keys_trace + self.values_trace


def collect_kv_fisher(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    round_trips: Mapping[str, RoundTrip | tuple[RoundTrip, RoundTrip]] | None = None,
    labels: FisherLabels = FisherLabels.SAMPLED,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> tuple[KvLayer, ...]:
    """Measure a Hugging Face causal LM's cache on tokens of real text, layer by layer.

    ``batches``: integer tensors (B, T) without padding. ``round_trips``: name -> the codec of a
    compressed cache, or one of its keys and one of its values. ``progress`` is called with the
    number of sequences done. Weights, their ``requires_grad`` and training flags are left as they
    were. Raises InputError for bad tokens and for models that keep no keys and values for each
    attention layer.
    """
    model = unwrap_model(model)
    blocks = attention_blocks(model)
    pairs = {
        name: trip if isinstance(trip, tuple) else (trip, trip)
        for name, trip in (round_trips or {}).items()
    }
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    # Rows: keys trace, values trace; then keys, values and directional damage per round trip.
    sums = torch.zeros(len(blocks), 2 + 3 * len(pairs), dtype=torch.float64)
    tokens = 0
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        for ids in batches:
            check_batch(ids, labels, model)
            probes = [_ProbeLayer() for _ in blocks]  # type: ignore[no-untyped-call]
            # What one sequence stores is read by it alone: gradients don't mix in a batch.
            sums += _measure_batch(model, ids.to(device), probes, pairs, labels, generator)
            tokens += ids.numel() - (0 if labels is FisherLabels.SAMPLED else len(ids))
            if progress is not None:
                progress(len(ids))
    finally:
        for module in training:
            module.training = True
    if not tokens:
        raise InputError("no text to measure the cache on: give at least one batch")
    rows = (sums / tokens).tolist()
    return tuple(
        KvLayer(
            layer=index,
            block=block,
            keys_trace=row[0],
            values_trace=row[1],
            damage={
                name: KvDamage(
                    keys=row[start] / 2, values=row[start + 1] / 2, directional=row[start + 2] / 2
                )
                for start, name in zip(range(2, len(row), 3), pairs, strict=True)
            },
        )
        for index, (block, row) in enumerate(zip(blocks, rows, strict=True))
    )


def attention_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the attention blocks in the order of their layers, one per layer of the cache."""
    found = [b for b in partition_model(model) if b.kind is BlockKind.ATTENTION]
    names = {b.layer: b.name for b in found}
    if not names or set(names) != set(range(len(names))):
        raise InputError(
            f"{type(model).__name__} has attention in layers {sorted(map(str, names))}: a cache of "
            "keys and values in every layer is needed"
        )
    return tuple(names[layer] for layer in range(len(names)))


class _ProbeLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A cache layer of one forward pass that adds zeros whose gradient is that of what is stored.

    The zeros are leaves, so gradients reach them whether or not the weights ask for any.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert not self.is_initialized, "a probe sees one pass"
        self.is_initialized = True
        self.states = (key_states.detach(), value_states.detach())
        self.zeros = tuple(torch.zeros_like(state, requires_grad=True) for state in self.states)
        return key_states + self.zeros[0], value_states + self.zeros[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _measure_batch(
    model: nn.Module,
    ids: Tensor,
    probes: list[_ProbeLayer],
    pairs: Mapping[str, tuple[RoundTrip, RoundTrip]],
    labels: FisherLabels,
    generator: torch.Generator,
) -> Tensor:
    """Return sums over the batch's tokens, (layers, columns)."""
    with torch.enable_grad():
        cache = Cache(layers=list(probes))
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        if labels is FisherLabels.DATA:
            logits, targets = logits[:, :-1], ids[:, 1:]
        flat = logits.reshape(-1, logits.shape[-1]).float()
        if not bool(flat.detach().isfinite().all()):
            raise FloatingPointError(
                f"the logits aren't finite: {find_fault(model) or 'try float32 weights'}"
            )
        if labels is FisherLabels.SAMPLED:
            targets = sample_labels(flat.detach().softmax(-1), generator)
        loss = F.cross_entropy(flat, targets.flatten(), reduction="sum")
        unused = [index for index, probe in enumerate(probes) if not probe.is_initialized]
        if unused:
            raise InputError(
                f"{type(model).__name__} caches nothing for layer {unused[0]}: its cache can't be "
                "ranked by layers"
            )
        gradients = torch.autograd.grad(loss, [zero for probe in probes for zero in probe.zeros])
    rows = []
    for index, probe in enumerate(probes):
        own = [gradient.double() for gradient in gradients[2 * index : 2 * index + 2]]
        row = [gradient.square().sum() for gradient in own]
        for trips in pairs.values():
            both = zip(trips, probe.states, strict=True)
            errors = [round_trip(state).double() - state.double() for round_trip, state in both]
            products = [g * e for g, e in zip(own, errors, strict=True)]
            row += [product.square().sum() for product in products]
            row.append(sum(p.flatten(1).sum(1) for p in products).square().sum())  # type: ignore[union-attr]
        rows.append(torch.stack(row).cpu())
    result = torch.stack(rows)
    if not bool(result.isfinite().all()):
        raise FloatingPointError("gradients of the cache aren't finite: try float32 weights")
    return result
