"""The outline of an nn.Module: which weights each block has, and how they lie in memory.

Only shapes, dtypes and names are read, so a model on the meta device will do.
"""

from torch import nn

from ..blocks import Piece, partition_model, tied_modules, unique_parameters
from ..hints import Hints, Identify, match_hints
from .outline import MatrixKind, Outline, OutlineBlock, Weight


def outline_model(model: nn.Module, hints: Hints, *, identify: Identify | None) -> Outline:
    """Match hints with a model and return its outline; ``identify`` None skips the identity check.
    Raises InputError for another model's hints.
    """
    blocks = partition_model(model)
    matched = match_hints(
        hints,
        [block.name for block in blocks],
        identify=identify,
        tied=tied_modules(blocks),
    )
    modules = dict(model.named_modules())
    shapes = {name: tuple(value.shape) for name, value in unique_parameters(model).items()}
    owners = {id(value): name for name, value in unique_parameters(model).items()}
    tied = {
        owners[id(value)]
        for name, value in model.named_parameters(remove_duplicate=False)
        if owners[id(value)] != name
    }
    config = getattr(model, "config", None)
    wanted_whole = set(getattr(model, "_no_split_modules", None) or ())
    return Outline(
        model_type=str(getattr(config, "model_type", "")),
        class_name=type(model).__name__,
        num_layers=len({block.layer for block in blocks} - {None}),
        blocks=tuple(
            OutlineBlock(
                name=block.name,
                layer=block.layer,
                modules=block.modules,
                weights=tuple(_weight(piece, modules, shapes, tied) for piece in block.pieces),
                hint=matched[block.name],
            )
            for block in blocks
        ),
        modules=frozenset(modules),
        whole=tuple(
            name for name, module in modules.items() if type(module).__name__ in wanted_whole
        ),
        buffers=tuple(
            name
            for name, module in modules.items()
            if name
            and any(True for _ in module.buffers(recurse=False))
            and not any(True for _ in module.parameters())
        ),
        provenance=hints.provenance,
    )


def _weight(
    piece: Piece,
    modules: dict[str, nn.Module],
    shapes: dict[str, tuple[int, ...]],
    tied: set[str],
) -> Weight:
    owner = piece.parameter.rpartition(".")[0]
    return Weight(
        name=piece.parameter,
        module=owner,
        layout=_layout(modules[owner], piece, shapes[piece.parameter]),
        shape=shapes[piece.parameter],
        num_params=piece.num_params,
        num_bytes=piece.num_bytes,
        expert=piece.expert,
        tied=piece.parameter in tied,
    )


def _layout(module: nn.Module, piece: Piece, shape: tuple[int, ...]) -> MatrixKind:
    if piece.expert is not None:
        if len(shape) != 3:
            return MatrixKind.OTHER
        transposed = getattr(module, "is_transposed", False)
        return MatrixKind.EXPERTS_TRANSPOSED if transposed else MatrixKind.EXPERTS
    if len(shape) != 2:
        return MatrixKind.OTHER
    if type(module).__name__ == "Conv1D":
        return MatrixKind.CONV1D
    if isinstance(module, nn.Embedding):
        return MatrixKind.EMBEDDING
    return MatrixKind.LINEAR if isinstance(module, nn.Linear) else MatrixKind.OTHER
