"""The partition of a model into blocks: submodules of layers, leaf modules, experts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor, nn

from ..errors import InputError
from .parameters import unwrap_model


class BlockKind(StrEnum):
    """What a block computes, for grouping in reports."""

    ATTENTION = "attention"
    MLP = "mlp"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    EXPERT = "expert"
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A parameter, or one expert's slice of it along dimension 0."""

    parameter: str
    expert: int | None
    num_params: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A managed unit. ``modules[0]`` owns the weights; the others compute with a tied weight of
    this block.
    """

    name: str
    kind: BlockKind
    layer: int | None
    pieces: tuple[Piece, ...]
    modules: tuple[str, ...]
    tied: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Weight bytes in the model's own dtype."""
        return sum(piece.num_bytes for piece in self.pieces)

    @property
    def num_params(self) -> int:
        """Number of weight elements."""
        return sum(piece.num_params for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one parameter name falls: the block it would belong to and the module whose forward
    uses it.
    """

    block: str
    module: str
    kind: BlockKind
    layer: int | None
    packed: bool = False


def select_piece(tensor: Tensor, piece: Piece) -> Tensor:
    """Return the part of a parameter-shaped tensor that the piece stands for (a view)."""
    return tensor if piece.expert is None else tensor[piece.expert]


def partition_model(model: nn.Module) -> tuple[Block, ...]:
    """Split a model into blocks that cover each weight byte exactly once, in definition order.

    Inside a repeated layer (an element of a ModuleList) each child module is a block; outside the
    layers each leaf module is. ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``, which
    may compute without calling their children, are one block each. Raises InputError for a model
    without parameters and for FSDP1 flat parameters.
    """
    model = unwrap_model(model)
    places = dict(_walk(model, "", None))
    if _takes_all_weights(model):
        places = {name: replace(place, module="") for name, place in places.items()}
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    pieces: dict[str, list[Piece]] = {}
    modules: dict[str, dict[str, None]] = {}
    tied: dict[str, list[str]] = {}
    first_place: dict[str, _Place] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if type(parameter).__name__ == "FlatParameter":
            raise InputError(
                f"parameter {name!r} is an FSDP1 FlatParameter without block structure: use FSDP2 "
                "(fully_shard)"
            )
        owner = canonical[id(parameter)]
        place = places[owner]
        num_slices = parameter.shape[0] if place.packed else 1
        for index in range(num_slices):
            block = f"{place.block}.{index}" if place.packed else place.block
            modules.setdefault(block, {})[places[name].module] = None
            if name != owner:
                tied.setdefault(block, []).append(name)
                continue
            first_place.setdefault(block, place)
            num_params = parameter.numel() // num_slices
            pieces.setdefault(block, []).append(
                Piece(
                    parameter=name,
                    expert=index if place.packed else None,
                    num_params=num_params,
                    num_bytes=num_params * parameter.element_size(),
                )
            )
    if not pieces:
        raise InputError(f"{type(model).__name__} has no parameters: there is nothing to place")
    return tuple(
        Block(
            name=block,
            kind=first_place[block].kind,
            layer=first_place[block].layer,
            pieces=tuple(block_pieces),
            modules=tuple(modules[block]),
            tied=tuple(tied.get(block, ())),
        )
        for block, block_pieces in pieces.items()
    )


def tied_modules(blocks: Iterable[Block]) -> dict[str, str]:
    """Return module -> block for modules without weights of their own that use a block's."""
    blocks = list(blocks)
    names = {block.name for block in blocks}
    return {
        module: block.name
        for block in blocks
        for module in block.modules[1:]
        if module not in names
    }


def _walk(module: nn.Module, name: str, layer: int | None) -> Iterator[tuple[str, _Place]]:
    """Visit a module that isn't a block: each parameter of its own is a block by itself, then come
    the children.
    """
    for own in _own_parameters(module):
        yield _join(name, own), _Place(_join(name, own), name, BlockKind.OTHER, layer)
    for child_name, child in _children(module):
        yield from _walk_child(child, _join(name, child_name), layer)


def _walk_child(module: nn.Module, name: str, layer: int | None) -> Iterator[tuple[str, _Place]]:
    kind = _kind(module, name)
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        # A list is never called, so it can't be a block; its elements are layers, or experts.
        for key, element in _children(module):
            element_name = _join(name, key)
            element_layer = int(key) if layer is None and key.isdigit() else layer
            if kind is BlockKind.EXPERT or not _children(element) or _takes_all_weights(element):
                yield from _block(
                    element, element_name, _Place(element_name, element_name, kind, element_layer)
                )
            else:
                yield from _walk(element, element_name, element_layer)
    elif _contains_layers(module):
        yield from _walk(module, name, layer)
    elif _takes_all_weights(module):
        yield from _block(module, name, _Place(name, name, kind, layer))
    elif layer is not None or not _children(module) or kind is not BlockKind.OTHER:
        yield from _block(module, name, _Place(name, name, kind, layer))
    else:
        yield from _walk(module, name, layer)


def _block(module: nn.Module, name: str, place: _Place) -> Iterator[tuple[str, _Place]]:
    """Put all parameters below a module into the place's block, except experts, which are blocks of
    their own.
    """
    num_experts = _num_packed_experts(module, name)
    for own, parameter in _own_parameters(module).items():
        packed = (
            num_experts is not None and parameter.dim() > 1 and parameter.shape[0] == num_experts
        )
        yield (
            _join(name, own),
            _Place(name, name, BlockKind.EXPERT, place.layer, packed=True) if packed else place,
        )
    for child_name, child in _children(module):
        child_fqn = _join(name, child_name)
        if isinstance(child, nn.ModuleList) and _is_experts(child, child_fqn):
            for key, expert in _children(child):
                fqn = _join(child_fqn, key)
                yield from _block(expert, fqn, _Place(fqn, fqn, BlockKind.EXPERT, place.layer))
        else:
            yield from _block(child, child_fqn, place)


def _kind(module: nn.Module, name: str) -> BlockKind:
    """Guess what a module computes from its type, its own name and its class name."""
    last = name.rsplit(".", 1)[-1].lower()
    words = f"{last} {type(module).__name__.lower()}"
    if _is_experts(module, name):
        return BlockKind.EXPERT
    if isinstance(module, nn.Embedding) or "embedding" in words:
        return BlockKind.EMBEDDING
    if "norm" in words or last.startswith("ln_"):
        return BlockKind.NORM
    if "attn" in words or "attention" in words:
        return BlockKind.ATTENTION
    if any(word in words for word in ("mlp", "ffn", "feed_forward", "feedforward", "moe")):
        return BlockKind.MLP
    if "head" in words or "classifier" in words:
        return BlockKind.HEAD
    return BlockKind.OTHER


def _is_experts(module: nn.Module, name: str) -> bool:
    """Say whether a module holds routed experts: a list of them, or packed parameters (a shared
    expert isn't one).
    """
    return name.rsplit(".", 1)[-1].lower().endswith("experts") and (
        isinstance(module, nn.ModuleList) or _num_packed_experts(module, name) is not None
    )


def _num_packed_experts(module: nn.Module, name: str) -> int | None:
    """Return E of the (E, ...) 3-D parameters of a packed experts module such as MixtralExperts,
    else None.
    """
    if "experts" not in f"{name.rsplit('.', 1)[-1]} {type(module).__name__}".lower():
        return None
    leading = {
        parameter.shape[0] for parameter in _own_parameters(module).values() if parameter.dim() == 3
    }
    return leading.pop() if len(leading) == 1 else None


def _contains_layers(module: nn.Module) -> bool:
    return any(
        isinstance(child, nn.ModuleList | nn.ModuleDict)
        and _children(child)
        and not _is_experts(child, name)
        for name, child in module.named_modules()
    )


def _takes_all_weights(module: nn.Module) -> bool:
    """Say whether a module computes with its children's weights, and doesn't call the children."""
    return isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention)


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in module._parameters.items() if parameter is not None
    }


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the children that have parameters; a module registered twice is listed twice."""
    return [
        (name, child)
        for name, child in module._modules.items()
        if child is not None and next(child.parameters(), None) is not None
    ]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
