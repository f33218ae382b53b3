"""How a parameter is stored at a precision: as a codec's record, or raw, and in which layout.

Only this decides it, for the runtime that stores weights and for the predictions of what that
costs. Records are made of matrices (rows, cols) with a group's weights along a row, hence along the
inputs: transformers' Conv1D keeps (in, out) and is stored transposed, and so is an expert of packed
ones that are kept so; those of (E, out, in) may be stored one below the other; the kernel of a
convolution belongs to its inputs. Vectors (norms, biases) stay raw, and so does a weight that a
record would make larger. Routers stay raw as well: they take a few KB, and an error that swaps
experts costs what no gradient predicts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..blocks import Block, takes_single_experts, unique_parameters, unwrap_model
from ..blocks.faults import describe_fault
from ..errors import InputError
from ..vocabulary import Precision, precision_rank
from .records import LARGEST_WEIGHT, RAW_DTYPES, Codec, RecordLayout, default_codec

_TRANSPOSED = {"Conv1D"}
"""Module classes whose weight is (in, out)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredForm:
    """A parameter stored as a record. ``transposed``: the record holds its transpose."""

    codec: Codec
    record: RecordLayout
    transposed: bool


def native_precision(dtype: torch.dtype) -> Precision:
    """Name the precision in which weights of a dtype are lossless."""
    return {torch.bfloat16: Precision.BF16, torch.float16: Precision.FP16}.get(
        dtype, Precision.FP32
    )


def stored_form(
    name: str,
    weight: Tensor,
    owner: nn.Module,
    precision: Precision | None,
    *,
    is_expert: bool = False,
) -> StoredForm | None:
    """Say how ``owner``'s parameter (meta will do) is stored at a precision; None: raw, lossless.

    ``name``: of the parameter in the model. ``precision`` None is lossless for every weight.
    ``is_expert``: the weight is one expert's slice of the parameter.
    """
    if precision is None or not is_lossy(weight, precision) or is_router(name, weight, owner):
        return None
    codec = default_codec(precision)
    transposed = is_transposed(owner) or is_expert and getattr(owner, "is_transposed", False)
    record = codec.layout(*matrix_shape(weight.shape, owner, transposed=transposed))
    if record.num_bytes >= weight.numel() * weight.element_size():
        # Rows of a few weights (small convolutions) would grow by their scales.
        return None
    return StoredForm(codec=codec, record=record, transposed=transposed)


def weight_form(model: nn.Module, name: str, precision: Precision) -> StoredForm | None:
    """Say how the parameter of that name is stored at a precision, or each expert's slice of it
    where these are stored one by one; None: raw, without an error.
    """
    model = unwrap_model(model)
    owner = model.get_submodule(name.rpartition(".")[0])
    weight: Tensor = model.get_parameter(name)
    is_expert = takes_single_experts(owner)
    if is_expert:
        weight = torch.empty(weight.shape[1:], dtype=weight.dtype, device="meta")
    return stored_form(name, weight, owner, precision, is_expert=is_expert)


def is_router(name: str, weight: Tensor, owner: nn.Module) -> bool:
    """Say whether a weight chooses experts, by the names that mixture models give it: that of a
    router, or a gate with fewer outputs than inputs (others scale activations).
    """
    path = name.lower().split(".")[:-1]
    if any("router" in part for part in (*path, type(owner).__name__.lower())):
        return True
    return "gate" in path and weight.dim() == 2 and weight.shape[0] < weight.shape[1]


def is_lossy(weight: Tensor, precision: Precision) -> bool:
    """Say whether a precision would change the weight: a matrix or more, and fewer bits."""
    return (
        weight.dim() > 1
        and weight.numel() > 0
        and weight.is_floating_point()
        and precision_rank(precision) > precision_rank(native_precision(weight.dtype))
    )


def is_transposed(owner: nn.Module) -> bool:
    """Say whether a module keeps its weight as (in, out)."""
    return type(owner).__name__ in _TRANSPOSED


def matrix_shape(shape: torch.Size, owner: nn.Module, *, transposed: bool) -> tuple[int, int]:
    """Return rows (output features, vocabulary) and columns (inputs) of a weight, not a vector."""
    if transposed:
        return shape[1], shape[0]
    if isinstance(owner, _ConvNd):
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def as_matrix(weight: Tensor, form: StoredForm) -> Tensor:
    """View a weight, one expert's slice of it, or the slices of some, as the matrix that a record
    holds (a copy where no view exists).
    """
    weight = weight.mT if form.transposed else weight
    return weight.reshape(-1, form.record.cols)


def name_weights(
    error: InputError,
    name: str,
    blocks: Iterable[Block],
    weights: Tensor,
    codec: Codec,
    *,
    first_row: int = 0,
) -> InputError:
    """Return a codec's error with the parameter, its block and the place of the weight in it.

    ``weights``: the parameter as it is, or its rows from ``first_row`` on.
    """
    raw = RAW_DTYPES.get(codec.precision)
    if raw is not None:
        bad = ~weights.to(raw).isfinite()
    else:
        bad = ~(weights.float().abs() <= LARGEST_WEIGHT)  # True for NaN too
    if not bool(bad.any()):
        return InputError(f"parameter {name!r}: {error}")
    return InputError(
        f"{describe_fault(name, blocks, bad, first_row=first_row)} NaN, infinite or too large for "
        f"{codec.precision}: mend it, or keep its block as it is"
    )


def stored_bytes(model: nn.Module, block: Block, precision: Precision) -> int:
    """Return the bytes that a block's weights take at a precision, scales and headers included.

    An expert that shares a record with others takes its share of it.
    """
    parameters = unique_parameters(model)
    total = 0
    for piece in block.pieces:
        form = weight_form(model, piece.parameter, precision)
        owner = unwrap_model(model).get_submodule(piece.parameter.rpartition(".")[0])
        if form is None:
            total += piece.num_bytes
        elif takes_single_experts(owner):
            total += form.record.num_bytes
        else:
            share = piece.num_params / parameters[piece.parameter].numel()
            total += round(form.record.num_bytes * share)
    return total
