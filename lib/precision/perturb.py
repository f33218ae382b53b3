"""The error that storing weights at a precision adds to them, from the codec itself.

``weight_error`` is the delta of every prediction; ``perturb`` puts it into a model for a while, so
that what it does can be measured. Both take the records that the runtime would store, in the same
layout (``storage``), and what it keeps raw has no error. Arithmetic of fused kernels (bfloat16
activations) isn't an error of the weights, and isn't here.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..blocks import Block, partition_model, select_piece, unique_parameters, unwrap_model
from ..codecs.records import decode, encode
from ..codecs.storage import StoredForm, as_matrix, name_weights, native_precision, weight_form
from ..errors import InputError
from ..vocabulary import Precision, precision_rank

CURVE_PRECISIONS = (
    Precision.BF16,
    Precision.INT8,
    Precision.INT6,
    Precision.INT5,
    Precision.INT4,
    Precision.INT3,
    Precision.INT2,
)
"""Precisions of a block's KL curve, most precise first. fp16 isn't among them: it takes the bytes
of bf16, and whether it is better depends on the weights' range."""


def curve_precisions(model: nn.Module) -> tuple[Precision, ...]:
    """Return the precisions of the KL curves of a model: those below its weights' own."""
    native = max(
        precision_rank(native_precision(parameter.dtype))
        for parameter in unique_parameters(model).values()
    )
    return tuple(p for p in CURVE_PRECISIONS if precision_rank(p) > native)


def round_trip(weight: Tensor, form: StoredForm) -> Tensor:
    """Return a weight, or one expert's slice of it, as its record gives it back: same shape, dtype
    and device, new memory.
    """
    matrix = as_matrix(weight.detach(), form)
    layout = form.codec.layout(*matrix.shape)
    record = encode(matrix, form.codec).to(weight.device)
    decoded = decode(record, layout, dtype=weight.dtype)
    return decoded.view(weight.mT.shape).mT if form.transposed else decoded.view(weight.shape)


def weight_error(model: nn.Module, name: str, precision: Precision) -> Tensor | None:
    """Return decoded minus original weights of a parameter, float32 or better; None: no error."""
    form = weight_form(model, name, precision)
    if form is None:
        return None
    weight = unwrap_model(model).get_parameter(name).detach()
    dtype = torch.promote_types(weight.dtype, torch.float32)
    try:
        decoded = round_trip(weight, form)
    except InputError as error:
        raise name_weights(error, name, partition_model(model), weight, form.codec) from error
    return decoded.to(dtype) - weight.to(dtype)


def lossy_blocks(model: nn.Module, precision: Precision) -> tuple[Block, ...]:
    """Return the blocks that storing at a precision changes; the others are norms and the like."""
    return tuple(
        block
        for block in partition_model(model)
        if any(weight_form(model, piece.parameter, precision) for piece in block.pieces)
    )


@contextmanager
def perturb(model: nn.Module, precisions: Mapping[str, Precision]) -> Iterator[None]:
    """Replace the weights of blocks by what their records decode to, in place; bit for bit restored
    on leaving.

    ``precisions``: block -> precision; other blocks stay. Holds a copy of the weights replaced.
    Raises InputError for a name that isn't a block's, for weights that aren't in memory, and for
    those that the precision can't hold.
    """
    blocks = {block.name: block for block in partition_model(model)}
    unknown = sorted(set(precisions) - blocks.keys())
    if unknown:
        raise InputError(
            f"{unknown[0]!r} is not a block: the model's are {', '.join(list(blocks)[:3])}, ..."
        )
    parameters = unique_parameters(model)
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for name, precision in precisions.items():
            for piece in blocks[name].pieces:
                parameter = parameters[piece.parameter]
                if parameter.device.type == "meta":
                    raise InputError(f"parameter {piece.parameter!r} isn't in memory: load it")
                form = weight_form(model, piece.parameter, precision)
                if form is None:
                    continue
                weight = select_piece(parameter.data, piece)
                try:
                    decoded = round_trip(weight, form)
                except InputError as error:
                    whole = weight if piece.expert is None else weight.unsqueeze(0)
                    raise name_weights(
                        error,
                        piece.parameter,
                        [blocks[name]],
                        whole,
                        form.codec,
                        first_row=piece.expert or 0,
                    ) from error
                kept.append((weight, weight.clone()))
                weight.copy_(decoded)
        yield
    finally:
        for weight, original in kept:
            weight.copy_(original)
