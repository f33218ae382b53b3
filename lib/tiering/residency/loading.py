"""Loading: how a group's weights get into fast memory for good.

They come from the model or its checkpoint as they are (``take_over``), from a store (``load``), or
are compressed on the way, without a file (``encode``).
"""

from torch import Tensor

from ...codecs.kernels import CompressedWeight, empty_weight
from ..payload.contents import payload_pieces
from ..payload.parts import Part
from .access import Access, Held
from .archive import Stored
from .stand_ins import set_weights


def take_over(access: Access, held: Held) -> None:
    """Let the weights that were given be what the parameters hold in fast memory."""
    for part in held.payload.parts:
        # In RAM a copy even on the same device: weights loaded from safetensors are slices of one
        # mapped file, which stays in memory for as long as any of them is used.
        copy = access.device.type == "cpu" and not access.originals.from_checkpoint
        weights = access.originals.read(part.parameter).to(access.device, copy=copy)
        set_weights(access.parameter(part), weights)


def load(access: Access, held: Held, stored: Stored) -> None:
    """Read a stored payload into weights of their own in fast memory."""
    payload, archive = held.payload, access.archive
    if payload.by_rows and payload.lossy:
        part = payload.parts[0]
        weight = _allocate(access, part)
        for buffer, shard in archive.shards(stored, payload):
            assert shard.record is not None
            weight.fill(shard.start, buffer[: shard.data_bytes], shard.record)
        access.reside(held, part, weight)
        return
    if not payload.lossy:
        for part in payload.parts:
            weights = archive.copy(stored, payload, part, access.device)
            set_weights(access.parameter(part), weights)
        return
    for part, source in archive.weights(stored, payload, lambda name: access.device):
        if part.record is None:
            set_weights(access.parameter(part), source)
        else:
            weight = _allocate(access, part)
            weight.fill(0, source, part.record)
            access.reside(held, part, weight)


def encode(access: Access, held: Held) -> None:
    """Make compressed weights from the originals."""
    copy = not access.originals.from_checkpoint  # not a part of larger memory
    made: dict[str, CompressedWeight] = {}
    plain: list[tuple[Part, Tensor]] = []
    for part, start, data, record in payload_pieces(held.payload, access.originals.read):
        if record is None:
            plain.append((part, data.to(access.device, copy=copy)))
            continue
        if part.parameter not in made:
            made[part.parameter] = _allocate(access, part)
        made[part.parameter].fill(start, data, record)
    for part, data in plain:
        set_weights(access.parameter(part), data)
    for part in held.payload.parts:
        if part.parameter in made:
            access.reside(held, part, made[part.parameter])


def _allocate(access: Access, part: Part) -> CompressedWeight:
    assert part.record is not None and access.scratch is not None
    return empty_weight(
        part.record,
        dtype=part.dtype,
        device=access.device,
        uses=part.uses,
        scratch=access.scratch,
    )
