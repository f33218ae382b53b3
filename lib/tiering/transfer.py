"""Real residency: weights of slow blocks leave fast memory and come back for each use of the block.

What stands in for a parameter that is away is in ``offloaded``, where its bytes are in ``stores``.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..blocks import Block, Piece, select_piece, storage_bytes, unique_parameters
from ..errors import InputError, PlacementError
from ..hints import Tier
from .offloaded import OffloadedParameter
from .stores import FileStore, HostStore, Store


@dataclass(slots=True)
class _Managed:
    """A parameter of which at least one piece belongs to a slow block."""

    parameter: nn.Parameter
    home: torch.device
    shape: Tensor
    """Meta tensor with the parameter's size, strides and dtype."""
    placeholder: Tensor
    holders: list[Block]
    num_pending: int
    """Slow holders that are not stored yet; the parameter goes away when none is left."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Experts of a packed parameter that stay in fast memory, by index."""
    num_holds: int = 0


class RealResidency:
    """Moves the weights of blocks between fast memory (the compute device) and the stores of their
    tiers.

    On a machine without an accelerator HBM and CPU are the same RAM, so only the SSD tier moves.
    Outputs are bit for bit those of the untouched model: weights come back with the same values,
    dtype and strides.
    """

    virtual_seconds = 0.0

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Block],
        tiers: Mapping[str, Tier],
        *,
        device: torch.device,
        spill_dir: Path | None,
    ) -> None:
        self._device = device
        self._parameters = unique_parameters(model)
        self._homes = {name: parameter.device for name, parameter in self._parameters.items()}
        self._buffers = [(buffer, buffer.device) for buffer in model.buffers()]
        self._trainable = [
            name for name, parameter in self._parameters.items() if parameter.requires_grad
        ]
        self._stores: dict[Tier, Store] = {}
        self._store_of: dict[str, Store] = {}
        self._num_holds: dict[str, int] = {}
        self.on_resident_change: Callable[[int], None] = lambda num_bytes: None
        self.on_demand: Callable[[Block, int], None] = lambda block, moved_bytes: None
        """Told of blocks fetched outside their module's forward, and the bytes that moved."""
        for name, parameter in self._parameters.items():
            _check_parameter(name, parameter)
        blocks = list(blocks)
        slow = _slow_blocks(blocks, tiers, device)
        _check_own_memory(self._parameters)
        self._managed = self._manage(blocks, slow)
        try:
            for parameter in self._parameters.values():
                # A backward pass would find weights that have gone again.
                parameter.requires_grad_(False)
            for block in slow:
                self._store_away(block, tiers[block.name], spill_dir)
            # In RAM a copy even on the same device: weights loaded from safetensors are slices of
            # one mapped file, which stays in memory for as long as any of them is used.
            copy = bool(slow) and device.type == "cpu"
            for name, parameter in self._parameters.items():
                if name not in self._managed:
                    parameter.data = parameter.data.to(device, copy=copy)
            for buffer, _ in self._buffers:
                buffer.data = buffer.data.to(device)
        except BaseException:
            self.close()
            raise

    def resident_bytes(self) -> int:
        """Measure the weight bytes in fast memory: storages of parameters there, and experts kept
        apart.
        """
        with torch._C.DisableTorchFunctionSubclass():
            there = [
                parameter.data
                for parameter in self._parameters.values()
                if parameter.device == self._device
            ]
        return storage_bytes(
            [
                *there,
                *(kept for managed in self._managed.values() for kept in managed.kept.values()),
            ]
        )

    def acquire(self, block: Block) -> tuple[int, float]:
        """Bring a block's weights into fast memory; returns the bytes moved and 0 virtual seconds.

        Nests. Blocks until the bytes are there. Raises PlacementError where the stored bytes are
        not sound.
        """
        num_holds = self._num_holds.get(block.name, 0)
        moved_bytes = 0
        if num_holds == 0:
            with torch.inference_mode(mode=False), torch.no_grad():
                moved_bytes = self._fetch(block)
        self._num_holds[block.name] = num_holds + 1
        return moved_bytes, 0.0

    def release(self, block: Block) -> None:
        """Give a block's fast memory back once nobody holds it; nothing is copied, since weights
        don't change.
        """
        self._num_holds[block.name] -= 1
        if self._num_holds[block.name] == 0:
            self._drop(self._managed_pieces(block))

    def reset(self) -> None:
        """Nothing to reset: real time is measured by the recorder."""

    def wait_error(self) -> None:
        """Real transfers have no target to miss."""
        return None

    def close(self) -> None:
        """Bring everything back to where it was; raises PlacementError naming what could not be
        restored.

        It may then be called again, with more memory free: what is stored stays stored.
        """
        failures = []
        for name in list(self._managed):
            try:
                self._restore(name)
            except (PlacementError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
                failures.append(f"{name}: {error}")
        for name, parameter in self._parameters.items():
            if name in self._managed:
                continue  # lost: it stays an OffloadedParameter, which raises when it is used
            if parameter.device != self._homes[name]:
                parameter.data = parameter.data.to(self._homes[name])
            parameter.requires_grad_(name in self._trainable)
        for buffer, home in self._buffers:
            buffer.data = buffer.data.to(home)
        if failures:
            raise PlacementError(
                f"{len(failures)} parameters could not be restored; free memory and detach again, "
                f"or reload the model: {failures[0]}"
            )
        for store in self._stores.values():
            store.close()

    def _restore(self, name: str) -> None:
        """Bring a parameter home for good, with all that its blocks bring along, so that each block
        is read once.
        """
        managed = self._managed.get(name)
        if managed is None:
            return  # came with an earlier one of its block
        if not isinstance(managed.parameter, OffloadedParameter) and managed.num_holds == 0:
            del self._managed[name]  # attach failed before it went away
            return
        with self._fetched(managed):
            whole = {
                name: (other, other.parameter.data.to(other.home, copy=True))
                for name, other in self._managed.items()
                if other.num_holds == len(other.holders)
            }
        for name, (other, weights) in whole.items():
            _set_weights(other.parameter, weights)
            del self._managed[name]

    def _manage(self, blocks: list[Block], slow: list[Block]) -> dict[str, _Managed]:
        names = dict.fromkeys(piece.parameter for block in slow for piece in block.pieces)
        slow_names = {block.name for block in slow}
        managed = {}
        for name in names:
            parameter = self._parameters[name]
            holders = [
                block for block in blocks if any(piece.parameter == name for piece in block.pieces)
            ]
            managed[name] = _Managed(
                parameter=parameter,
                home=parameter.device,
                shape=torch.empty_strided(
                    parameter.size(), parameter.stride(), dtype=parameter.dtype, device="meta"
                ),
                placeholder=torch.empty(0, dtype=parameter.dtype, device=self._device),
                holders=holders,
                num_pending=sum(block.name in slow_names for block in holders),
            )
        return managed

    def _store_away(self, block: Block, tier: Tier, spill_dir: Path | None) -> None:
        """Store a slow block, and let each parameter go of which every slow piece is stored now."""
        if tier not in self._stores:
            pinned = self._device.type == "cuda"
            self._stores[tier] = (
                FileStore(spill_dir) if tier is Tier.SSD else HostStore(pinned=pinned)
            )
        pieces = self._managed_pieces(block)
        self._stores[tier].put(
            block.name,
            {
                piece.parameter: select_piece(managed.parameter.data, piece)
                for piece, managed in pieces
            },
        )
        self._store_of[block.name] = self._stores[tier]
        for _, managed in pieces:
            managed.num_pending -= 1
            if managed.num_pending == 0:
                self._keep_fast_experts(managed)
                self._send_away(managed)

    def _keep_fast_experts(self, managed: _Managed) -> None:
        for holder in managed.holders:
            if holder.name not in self._store_of:
                for piece, owner in self._managed_pieces(holder):
                    if owner is managed and piece.expert is not None:
                        managed.kept[piece.expert] = select_piece(managed.parameter.data, piece).to(
                            self._device, copy=True
                        )

    def _fetch(self, block: Block) -> int:
        pieces = self._managed_pieces(block)
        if not pieces:
            return 0
        store = self._store_of.get(block.name)
        stored = store.get(block.name) if store is not None else {}
        placed: list[Tensor] = []
        held: list[tuple[Piece, _Managed]] = []
        try:
            for piece, managed in pieces:
                if piece.expert is None:
                    placed.append(stored[piece.parameter].to(self._device, non_blocking=True))
                    _set_weights(managed.parameter, placed[-1])
                else:
                    if managed.num_holds == 0:
                        placed.append(torch.empty_like(managed.shape, device=self._device))
                        _set_weights(managed.parameter, placed[-1])
                    source = (
                        stored[piece.parameter] if store is not None else managed.kept[piece.expert]
                    )
                    select_piece(managed.parameter.data, piece).copy_(source, non_blocking=True)
                managed.num_holds += 1
                held.append((piece, managed))
        except BaseException:
            self._drop(held)
            raise
        self.on_resident_change(storage_bytes(placed))
        return block.num_bytes if store is not None else 0

    def _drop(self, pieces: list[tuple[Piece, _Managed]]) -> None:
        dropped = []
        for _, managed in pieces:
            managed.num_holds -= 1
            if managed.num_holds == 0:
                dropped.append(managed.parameter.data)
                self._send_away(managed)
        self.on_resident_change(-storage_bytes(dropped))

    def _send_away(self, managed: _Managed) -> None:
        parameter = managed.parameter
        parameter.data = managed.placeholder
        parameter.__class__ = OffloadedParameter
        offloaded = cast(OffloadedParameter, parameter)
        offloaded._tierhints_shape = managed.shape
        offloaded._tierhints_fetch = lambda: self._fetched(managed)

    @contextlib.contextmanager
    def _fetched(self, managed: _Managed) -> Iterator[None]:
        """Hold every block that a parameter belongs to."""
        with contextlib.ExitStack() as stack:
            for block in managed.holders:
                moved_bytes, _ = self.acquire(block)
                stack.callback(self.release, block)
                self.on_demand(block, moved_bytes)
            yield

    def _managed_pieces(self, block: Block) -> list[tuple[Piece, _Managed]]:
        return [
            (piece, self._managed[piece.parameter])
            for piece in block.pieces
            if piece.parameter in self._managed
        ]


def _set_weights(parameter: nn.Parameter, weights: Tensor) -> None:
    """Turn an offloaded parameter back into a plain one with these weights."""
    if isinstance(parameter, OffloadedParameter):
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        del parameter._tierhints_shape, parameter._tierhints_fetch
    parameter.data = weights


def _slow_blocks(
    blocks: list[Block], tiers: Mapping[str, Tier], device: torch.device
) -> list[Block]:
    """Return the blocks whose tier is not the compute device's own memory; refuses tiers that this
    machine lacks.
    """
    fast = {Tier.HBM} if device.type != "cpu" else {Tier.HBM, Tier.CPU}
    for block in blocks:
        if tiers[block.name] not in {Tier.HBM, Tier.CPU, Tier.SSD}:
            raise InputError(
                f"block {block.name!r}: real mode has no {tiers[block.name]} tier; use HBM, CPU or "
                "SSD, or mode='emulated'"
            )
    return [block for block in blocks if tiers[block.name] not in fast]


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        raise InputError(
            f"parameter {name!r} is a {type(parameter.data).__name__}: only plain dense tensors "
            "can be offloaded"
        )
    if parameter.device.type == "meta":
        raise InputError(f"parameter {name!r} is on the meta device: load its weights first")
    if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        raise InputError(
            f"parameter {name!r} has overlapping or padded memory: make it contiguous first"
        )


def _check_own_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse parameters tied by memory and not by identity: offloading would part them."""
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        if parameter.numel():
            other = seen.setdefault(parameter.data_ptr(), name)
            if other != name:
                raise InputError(
                    f"parameters {other!r} and {name!r} share memory but are two parameters: tie "
                    "them by assigning the same Parameter to both"
                )
