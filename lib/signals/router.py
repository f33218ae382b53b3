"""How often each expert was routed to: counts by block, taken while a model trains or is measured.

A hook before each module of packed experts counts the expert ids that it receives, as transformers
hands them over: ``(hidden_states, top_k_index, top_k_weights)``. In a list of expert modules a hook
before each expert counts the rows that it is called with. Nothing of the computation is touched,
and no hook waits for the device. Counts are exact whole numbers:

- Tokens that the model's ``attention_mask`` marks as padding aren't counted with packed experts,
  whether or not they were computed. A list of experts doesn't show which rows those are: all count.
- A pass that gradient checkpointing makes again in the backward pass isn't counted again.
- Ids that are no expert of this process (expert parallelism) aren't counted.

There are no counts of models that compute every expert of a layer. A failure in a hook never
reaches the model: the counts are then missing, and a warning says why.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..blocks import BlockKind, partition_model, unwrap_model
from .interface import Measurement, Progress, register_signal
from .meter import explain, warn_safely
from .summary import causal_logits, check_token_ids, dtype_names

SIGNAL = "router_counts"


class RouterCounter:
    """Counts how often each expert of a model is routed to, until ``remove`` or the end of a
    ``with`` block.

    ``training``: count passes in training mode alone, so that evaluations between steps don't.
    ``counts``: those of a run that is continued, block -> count.
    """

    def __init__(
        self, model: nn.Module, *, training: bool, counts: Mapping[str, int] | None = None
    ) -> None:
        network = unwrap_model(model)
        experts = [b for b in partition_model(network) if b.kind is BlockKind.EXPERT]
        packed = {b.modules[0] for b in experts if b.pieces[0].expert is not None}
        self._training = training
        self._experts: dict[str, list[str]] = {}  # module -> its blocks, expert 0 first
        for block in experts:
            self._experts.setdefault(block.modules[0], []).append(block.name)
        names = [name for blocks in self._experts.values() for name in blocks]
        self._past = {name: int((counts or {}).get(name, 0)) for name in names}
        self._new: dict[str, Tensor] = {}  # module -> its experts' counts, and one that is dropped
        self._mask: Tensor | None = None
        self._fault = False
        self._hooks: list[Any] = []
        if packed:
            self._hook(network, self._note_mask)
        for name in self._experts:
            counting = self._count_ids if name in packed else self._count_rows
            self._hook(network.get_submodule(name), counting, name)

    def __enter__(self) -> "RouterCounter":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks out again; the counts stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._mask = None

    def fold(self, add: Callable[[Tensor], Tensor] = lambda counts: counts) -> dict[str, int]:
        """Return the counts so far, block -> count, those of other processes included.

        ``add`` returns the sum of an int64 vector over all processes; each of them must then call
        ``fold`` as often. Empty for a model without experts, and where counting failed.
        """
        if not self._past:
            return {}
        counts = {
            name: torch.zeros(len(blocks), dtype=torch.int64)
            for name, blocks in self._experts.items()
        }
        with self._guarded():
            for name, new in self._new.items():
                counts[name] = new[:-1].cpu()
        # A process whose counting failed says so in the last place.
        vector = add(torch.cat([*counts.values(), torch.tensor([int(self._fault)])])).tolist()
        for block, count in zip(list(self._past), vector[:-1], strict=True):
            self._past[block] += count
        self._new.clear()
        self._fault = vector[-1] > 0
        return {} if self._fault else dict(self._past)

    def _hook(self, module: nn.Module, function: Any, *names: str) -> None:
        def call(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # A graph task runs while this thread is in a backward pass.
            recomputed = torch._C._current_graph_task_id() != -1
            if self._fault or recomputed or (self._training and not called.training):
                return
            with torch.no_grad(), self._guarded():
                function(*names, args, kwargs)

        # Under torch.compile the graph breaks here, instead of being made anew for every count.
        hook: Any = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let a failure cost the counts: this is in the middle of the user's training."""
        try:
            yield
        except Exception as error:
            self._fault = True
            warn_safely(f"experts could not be counted: {explain(error)}")

    def _note_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _count_ids(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = routed_ids(args, kwargs)
        if ids is None:
            self._fault = True
        else:
            self._add(name, ids, _unmasked(ids, self._mask))

    def _count_rows(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        rows = hidden.numel() // hidden.shape[-1]
        ids = torch.zeros(1, 1, dtype=torch.int64)
        self._add(name, ids, torch.full_like(ids, rows))

    def _add(self, name: str, ids: Tensor, amounts: Tensor) -> None:
        num_experts = len(self._experts[name])
        if name not in self._new:
            self._new[name] = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
        # Not bincount, which waits for the device; integers add up to the same in any order.
        places = ids.flatten().to(torch.int64).clamp(max=num_experts)
        self._new[name].scatter_add_(0, places, amounts.flatten())


def routed_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the expert ids (tokens, k) among what a module of packed experts was called with; None
    in models that compute every expert.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32):
            return value.reshape(-1, value.shape[-1])
    return None


def _unmasked(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return 1 for each id (tokens, k) of a token that counts, 0 for padding.

    A mask (B, S) that also covers cached tokens ends with those of this pass.
    """
    if mask is None or len(ids) % len(mask) or len(ids) // len(mask) > mask.shape[1]:
        return torch.ones_like(ids, dtype=torch.int64)
    length = len(ids) // len(mask)
    keep = mask[:, mask.shape[1] - length :].reshape(-1, 1).ne(0)
    return keep.to(ids.device, torch.int64).expand_as(ids)


def router_signals(counts: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return counts as hints have them: block -> ``router_counts`` -> number."""
    return {block: {SIGNAL: float(count)} for block, count in counts.items()}


@register_signal
class RouterCounts:
    """Ranks blocks by the share of tokens that use them: of an expert those routed to it, of any
    other block all.
    """

    name: ClassVar[str] = SIGNAL

    def measure(
        self, model: nn.Module, batches: Iterable[Tensor], *, progress: Progress | None = None
    ) -> Measurement:
        """Count on token ids (B, T); one forward pass per batch."""
        network = unwrap_model(model)
        device = next(network.parameters()).device
        tokens = sequences = 0
        with RouterCounter(network, training=False) as counter, torch.no_grad():
            for batch in batches:
                check_token_ids(batch, network)
                causal_logits(network, batch.to(device))
                tokens += batch.numel()
                sequences += len(batch)
                if progress is not None:
                    progress(len(batch))
        counts = counter.fold()
        used = {block.name: counts.get(block.name, tokens) for block in partition_model(network)}
        return Measurement(
            mass={name: float(count) for name, count in used.items()},
            density={name: count / tokens if tokens else None for name, count in used.items()},
            signals=router_signals(counts),
            provenance={
                "signal": self.name,
                "tokens": tokens,
                "sequences": sequences,
                "dtype": dtype_names(network),
            },
        )
